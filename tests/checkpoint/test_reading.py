"""What is loaded by name from a directory: a state or its variables, of the newest, the best or any step."""

import jax
import optax
import pytest

from kaun import Vars
from kaun.checkpoint import Best, Directory, one
from kaun.errors import ResumeMismatch


@pytest.fixture
def runs(disk, tmp_path, make):
    """Steps 3, 5 and 8; the best one is 5."""
    best = {5: Best("accuracy", "max", 0.75, 5, (5,)), 8: Best("accuracy", "max", 0.75, 5, (5,))}
    for step in (3, 5, 8):
        facts = {"best": best[step].fact()} if step in best else {}
        one.Draft(step, make(step), {}, facts).write(disk, tmp_path / f"step-{step:08d}")
    return Directory(tmp_path)


def flip(path, at=-5):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def test_by_name(runs, make, same):
    for at, step in (("newest", 8), ("best", 5), (3, 3)):
        assert same(runs.load(make(1), at), make(step)) and same(runs.load(make(1), at=at), make(step))
        assert same(runs.load_vars(make(1), at=at), make(step).vars)
    assert same(runs.load(make(1)), make(8)) and same(runs.load_vars(make(1)), make(8).vars)


def test_variables_of_another_optimizer(runs, make, same):
    other = make(1, optimizer=optax.adam(0.1))
    with pytest.raises(ResumeMismatch, match="The variables fit, and the optimizer is another one"):
        runs.load(other)
    for like in (other, other.vars, jax.eval_shape(lambda: make(1)), jax.eval_shape(lambda: make(1).vars)):
        found = runs.load_vars(like)
        assert isinstance(found, Vars) and same(found, make(8).vars)


def test_no_array_is_made_of_other_leaves(runs, make, monkeypatch):
    read = []
    decode = one.encoding.decode
    monkeypatch.setattr(one.encoding, "decode", lambda place, array: read.append(place.name) or decode(place, array))
    runs.load_vars(make(1))
    assert sorted(read) == ["vars.params.bias", "vars.params.weight"]


def test_variables_of_another_model_are_a_mismatch(runs, make):
    with pytest.raises(
        ResumeMismatch,
        match=r"(?s)of step 8 .* does not match .*\n  vars\.params\.weight: expected float32\[3, 1\], found float32\[2, 1\]",
    ):
        runs.load_vars(make(1, width=3))


@pytest.mark.parametrize("name", [one.STATE, one.MANIFEST])
def test_variables_are_verified_too(runs, make, same, name):
    """Also where the byte is not one of theirs: the first array is the optimizer's, or of another leaf."""
    flip(runs.path / "step-00000008" / name, at=-9 if name == one.MANIFEST else -1)
    with pytest.warns(UserWarning, match=r"loaded step 5, because newer checkpoints are damaged:\n  step-00000008"):
        assert same(runs.load_vars(make(1)), make(5).vars)
    with pytest.raises(ValueError, match=r"is undamaged:\n  step-00000008: "):
        runs.load_vars(make(1), at=8)


def test_a_large_state_is_read_past_in_pieces(disk, tmp_path, make, same):
    """The sums of more than 4 MiB are made in threads, of memory that each of them uses again."""
    big = make(1, width=600_000)
    one.Draft(1, big, {}, {}).write(disk, tmp_path / "step-00000001")
    assert same(Directory(tmp_path).load_vars(big), big.vars)
    flip(tmp_path / "step-00000001" / one.STATE, at=2_000_000)
    with pytest.raises(
        ValueError,
        match=r"their CRC-32 differs in its header, 'opt_state\.0\.trace\.bias', 'opt_state\.0\.trace\.weight'",
    ):
        Directory(tmp_path).load_vars(big)


def test_the_best_one_is_found_where_the_newest_manifest_is_damaged(runs, make, same):
    flip(runs.path / "step-00000008" / one.MANIFEST)
    assert same(runs.load(make(1), at="best"), make(5))
    flip(runs.path / "step-00000005" / one.MANIFEST)
    with pytest.raises(FileNotFoundError, match=r"has no best checkpoint.*It has these steps: \[3, 5, 8\]"):
        runs.load(make(1), at="best")


def test_a_best_one_that_is_damaged_or_gone_is_an_error(runs, disk, tmp_path, make):
    flip(runs.path / "step-00000005" / one.STATE)
    with pytest.raises(ValueError, match=r"is undamaged:\n  step-00000005: state"):
        runs.load(make(1), at="best")
    best = Best("accu\x1bracy", "max", 0.75, 6).fact()
    one.Draft(9, make(9), {}, {"best": best}).write(disk, tmp_path / "step-00000009")
    text = r"there is no checkpoint of the best step 6 \(accu\\x1bracy 0\.75\) in .*\. It has these steps: \[3, 5, 8, 9\]\."
    with pytest.raises(FileNotFoundError, match=text):
        runs.load(make(1), at="best")


@pytest.mark.parametrize("record", [3, {}, {"name": "a"}, [1], "x"], ids=repr)
def test_a_record_of_another_program_is_refused(disk, tmp_path, make, record):
    one.Draft(9, make(9), {}, {"best": record}).write(disk, tmp_path / "step-00000009")
    with pytest.raises(ResumeMismatch, match="is intact, but its record of the best step is not one that kaun writes"):
        Directory(tmp_path).load(make(1), at="best")
    assert int(Directory(tmp_path).load(make(1)).step) == 9


@pytest.mark.parametrize("change", [{"mode": "most"}, {"value": "nan"}, {"value": 3.0}, {"step": 0}, {"step": "1"},
                                    {"extra": ["1"]}, {"extra": 3}, {"name": 3}], ids=repr)  # fmt: skip
def test_a_record_of_another_form_is_refused(change):
    record = Best("loss", "min", 0.1, 4, (2, 4))
    assert Best.of({"best": record.fact()}) == record and Best.of({}) is None
    with pytest.raises(ValueError, match="its record of the best step is not one that kaun writes"):
        Best.of({"best": record.fact() | change})


def test_what_may_be_asked_for(runs, make):
    for method in ("load", "load_vars"):
        with pytest.raises(
            ValueError, match=rf"Directory\.{method}: at expected 'newest', 'best' or a step, received 'last'"
        ):
            getattr(runs, method)(make(1), at="last")
        for at in (True, 2.0, None):
            with pytest.raises(TypeError, match=rf"Directory\.{method}: at expected .*, received {at}\. Write at=1200"):
                getattr(runs, method)(make(1), at=at)
        for at in ("newest", "best", 3):
            with pytest.raises(FileNotFoundError, match=r"there is no checkpoint in .*none'\. Train with"):
                getattr(Directory(runs.path / "none"), method)(make(1), at=at)
    with pytest.raises(
        TypeError, match=r"load_vars expected a Vars or a TrainState, received dict\. Write runs.load_vars\("
    ):
        runs.load_vars(make(1).vars.params)


def test_many_steps_are_listed_in_part(tmp_path, make):
    for step in range(1, 103):
        (tmp_path / f"step-{step:08d}").mkdir()
    with pytest.raises(FileNotFoundError, match=r"It has 102 steps, the newest of them: \[3, 4, .*, 102\]\."):
        Directory(tmp_path).load(make(1), at=200)
