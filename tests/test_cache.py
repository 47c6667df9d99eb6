"""kaun.cache: programs are kept on disk, small ones too, and found there again."""

import jax
import jax.numpy as jnp
import pytest

import kaun


def test_a_small_program_is_kept_and_found(tmp_path):
    folder = tmp_path / "some" / "folder"
    kaun.cache(folder)
    events = []
    jax.monitoring.register_event_listener(lambda name, **kwargs: events.append(name.rpartition("/")[2]))
    f, x = (lambda a: jnp.sin(a) * 12345.0), jnp.ones(3)
    events.clear()
    for _ in range(2):
        jax.block_until_ready(jax.jit(f)(x))
        assert [p.name for p in folder.iterdir() if p.name.startswith("jit__lambda")]
        jax.clear_caches()
    assert [name for name in events if name in ("cache_misses", "cache_hits")] == ["cache_misses", "cache_hits"]


@pytest.mark.parametrize("path", [None, 3, "", b"x"])
def test_what_is_no_path(path):
    with pytest.raises(
        TypeError, match=r"cache expected the path of a folder, received .*\. Write kaun\.cache\(\"~/\."
    ):
        kaun.cache(path)


def test_home_and_a_file_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    kaun.cache("~/programs")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        kaun.cache(tmp_path / "file" / "folder")
