"""The interface of a report: its defaults, what duck-typed objects may leave out, and what is refused before step 1."""

import types

import numpy as np
import optax
import pytest

from kaun import Data, EarlyStop, Trainer, layers, losses, reports, rng
from kaun._report import check_report, member


def report_with(**members):
    """An object of another class that is callable as a report, with these members."""
    call = {"__call__": lambda self, step, loss, state: None}
    return type("Mine", (), call | members)()


def make_fit():
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        start = trainer.init()
        x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
        data = Data.batches((x, x[:, :1]), batch_size=4).with_loss(losses.mse)
    return lambda report: trainer.fit(start, data, report=report)


@pytest.fixture(scope="module")
def fit():
    return make_fit()


def test_a_report_without_anything_wants_no_step_and_does_nothing(fit):
    report = reports.Report()
    assert not report.wants(1) and report(1, 0.5, None) is None
    assert report.measures == report.watches == report.numbers == ()
    assert (
        report.block(1, {}) is report.compiling("fit") is report.begin(1, None, frozenset(), 1) is report.end() is None
    )
    assert report.observe(1, {}, None) is report.restore({}) is None and report.snapshot() == {}
    for composed in (report, reports.every(2, report), reports.all_of(report)):
        assert int(fit(composed).step) == 5
    assert [name for name in ("block", "begin", "observe", "snapshot") if member(report, name)] == []


def test_a_subclass_with_a_call_wants_every_step_and_one_without_none(fit):
    class Called(reports.Report):
        def __call__(self, step, loss, state):
            seen.append(step)

    class Blocks(reports.Report):
        def block(self, first_step, values):
            taken.extend(values["loss"].tolist())

    seen, taken = [], []
    fit(reports.all_of(Called(), Blocks()))
    fit(Called())
    fit(reports.every(2, Called()))
    assert seen == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 2, 4] and len(taken) == 5
    assert Called().wants(1) and not Blocks().wants(1)


def test_all_members_are_called_with_what_the_interface_lists():
    fit, log = make_fit(), []

    class All(reports.Report):
        measures = ("m",)
        watches = ("m",)

        def __call__(self, step, loss, state):
            log.append(("call", step, type(loss), int(state.step)))
            return {"m": 1.0}

        def wants(self, step):
            return step == 2

        def block(self, first_step, values):
            log.append(("block", first_step, sorted(values)))

        def begin(self, first_step, total, measured, every, state):
            log.append(("begin", first_step, total, measured, every, int(state.step)))

        def end(self):
            log.append(("end",))

        def compiling(self, where):
            log.append(("compiling", where))
            return lambda seconds: log.append(("compiled", type(seconds)))

    class Observer(reports.Report):
        def observe(self, step, values, state):
            log.append(("observe", step, values, int(state.step)))

    fit(reports.all_of(Observer(), reports.every(2, All())))
    assert log[:3] == [("begin", 1, 5, frozenset({"m"}), 2, 0), ("compiling", "fit"), ("compiled", float)]
    assert log[-1] == ("end",)
    names = ["examples_per_second", "examples_per_step", "grad_norm", "learning_rate", "loss", "loss_weight"]
    names += ["step", "step_time"]
    blocks = [entry for entry in log if entry[0] == "block"]
    assert blocks[0] == ("block", 1, names) and {tuple(entry[2]) for entry in blocks} == {tuple(names)}
    assert [entry for entry in log if entry[0] in ("call", "observe")] == [
        ("call", 2, float, 2),
        ("observe", 2, {"m": 1.0}, 2),
    ]
    assert log.index(blocks[0]) < log.index(("call", 2, float, 2)) < log.index(blocks[-1])


def test_a_method_may_take_fewer_arguments_and_gets_the_first_ones():
    got = []
    report = report_with(
        begin=lambda self, first_step, total: got.append((first_step, total)),
        observe=lambda self, step, values: got.append((step, values)),
        block=lambda self, *given: got.append(given),
        end=lambda self, more=None: got.append(more),
        wants=lambda self: True,
    )
    member(report, "begin")(1, 9, frozenset(), 1)
    member(report, "observe")(1, {"a": 0.5}, "state")
    member(report, "block")(3, {})
    member(report, "end")()
    assert got == [(1, 9), (1, {"a": 0.5}), (3, {}), None] and member(report, "wants")(7)
    report.compiling = [].append
    assert member(report, "compiling")("fit") is None
    report.restore = max  # has no signature
    assert member(report, "restore") is max


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (
            {"observe": lambda self, step, values, state, more: None},
            r"`observe` of the report `Mine` must be a method that takes \(step, values, state\), or the first of these "
            r"arguments, received <lambda>\. Write def observe\(self, step, values, state\)\.",
        ),
        ({"end": lambda self, error: None}, r"`end` .* takes \(\), .*Write def end\(self\)\."),
        ({"wants": True}, r"`wants` .* takes \(step\), .* received True\. Write def wants\(self, step\)\."),
        (
            {"snapshot": lambda self: {}},
            r"`Mine` has snapshot\(\) but no restore\(values\), .* Write def restore\(self, values\)",
        ),
        (
            {"measures": "accuracy"},
            r"`measures` of the report `Mine` must be a collection of names, received str\. Write measures = \(\"accuracy\",\)",
        ),
        ({"watches": lambda self: ("a",)}, r"`watches` .* received \w+\. Write watches = \(\"accuracy\",\)"),
        ({"measures": (1,)}, "`measures` .* must be a collection of names, received"),
    ],
)
def test_a_member_of_the_wrong_kind_is_refused(members, text):
    for use in (lambda report: reports.all_of(report), lambda report: reports.every(2, report)):
        with pytest.raises(TypeError, match=text):
            use(report_with(**members))


def test_numbers_that_no_step_computes_are_refused(fit):
    class Norms(reports.Report):
        numbers = ("layer_norm",)

    with pytest.raises(
        ValueError,
        match=r"`Norms` has 'layer_norm' in `numbers`, which no step can compute; known names: 'layer_norms'\. Return it "
        r"from the loss: \(loss, {'layer_norm': value}\)\.",
    ):
        fit(Norms())


MISSES = {
    "want": "wants",
    "wanted": "wants",
    "wnats": "wants",
    "blocks": "block",
    "on_block": "block",
    "began": "begin",
    "on_begin": "begin",
    "on_end": "end",
    "onEnd": "end",
    "ended": "end",
    "compile": "compiling",
    "observed": "observe",
    "observer": "observe",
    "snap_shot": "snapshot",
    "restores": "restore",
    # Names from before there was an interface.
    "compiled": "compiling",
    "judge": "observe",
    "beside": "begin",
    "thinned": "begin",
    "adds": "block",
}


@pytest.mark.parametrize("name", MISSES)
def test_a_method_that_is_nearly_one_of_the_interface_is_refused_with_the_nearest_name(name):
    text = (
        rf"`Mine` has a method `{name}`, which fit does not call; the nearest name that it calls is `{MISSES[name]}`\. "
    )
    with pytest.raises(TypeError, match=text + rf"Write def {MISSES[name]}\(self.*\), or, .*_{name}\."):
        check_report(report_with(**{name: lambda self, *given: None}), "fit")
    mine = type("Mine", (reports.Report,), {name: lambda self, *given: None})
    with pytest.raises(TypeError, match=text):
        reports.all_of(mine())
    function = lambda step, loss, state: None
    setattr(function, name, lambda step: True)
    with pytest.raises(TypeError, match=rf"has a method `{name}`"):
        reports.every(2, function)
    check_report(report_with(**{name: 3}), "fit")


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("measure", ("accuracy",), "measures"),
        ("measured", ["accuracy"], "measures"),
        ("watch", "loss", "watches"),
        ("watching", {"loss"}, "watches"),
        ("number", ("layer_norms",), "numbers"),
    ],
)
def test_names_under_nearly_the_right_name_are_refused(name, value, nearest):
    text = rf"has an attribute `{name}`, which fit does not read; the nearest name that it reads is `{nearest}`\. Write {nearest} = "
    with pytest.raises(TypeError, match=text):
        check_report(report_with(**{name: value}), "fit")
    if nearest != "numbers":  # no number is known yet
        check_report(report_with(**{name: value, nearest: ("loss",)}), "fit")


ORDINARY = [
    "add",
    "append",
    "best",
    "best_step",
    "clear",
    "close",
    "count",
    "current",
    "draw",
    "emit",
    "encode",
    "enter",
    "evaluate",
    "extend",
    "finish",
    "flush",
    "history",
    "load",
    "log",
    "losses",
    "mean",
    "measure",
    "name",
    "number",
    "open",
    "path",
    "plot",
    "print",
    "read",
    "render",
    "reset",
    "restart",
    "restore_best",
    "result",
    "results",
    "resume",
    "run",
    "save",
    "send",
    "show",
    "snapshot_path",
    "start",
    "state",
    "step",
    "stop",
    "store",
    "total",
    "update",
    "value",
    "values",
    "wait",
    "warn",
    "watch",
    "weights",
    "window",
    "write",
]


def test_helpers_of_a_report_are_left_alone():
    check_report(report_with(**dict.fromkeys(ORDINARY, lambda self: None)), "fit")
    check_report(report_with(**dict.fromkeys([*ORDINARY, "blocks", "observed", "wanted"], 3)), "fit")
    check_report(report_with(measured={}, watched=0.5, numbers_seen=[1, 2], want="not a method"), "fit")
    # Beside the method itself, a similar name is not a misspelling of it.
    both = dict.fromkeys(["block", "blocks", "observe", "observed", "_want"], lambda self, *given: None)
    check_report(report_with(**both), "fit")
    check_report(types.MethodType(lambda self, step, loss, state: None, "self"), "fit")


def test_early_stop_in_observe_ends_the_fit_at_that_step(fit):
    class Stop(reports.Report):
        watches = ("m",)

        def observe(self, step, values, state):
            if step == 3:
                raise EarlyStop

    class Measure(reports.Report):
        measures = ("m",)

        def __call__(self, step, loss, state):
            return {"m": loss}

    assert int(fit(reports.all_of(Stop(), Measure())).step) == 3
