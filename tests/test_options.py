"""Options: what is refused when they are set, and where they come from."""

import inspect

import platformdirs
import pytest
import torch
from torch import nn

import torchcache
from torchcache import CacheOptions, cached
from torchcache.options import default_cache_dir

WRONG = [
    ("enabled", 1, TypeError),
    ("persistent", "yes", TypeError),
    ("persistent_cache_dir", 3, TypeError),
    ("persistent_module_hash", 3, TypeError),
    ("persistent_module_hash", "", ValueError),
    ("max_persistent_cache_size", "10GB", TypeError),
    ("max_persistent_cache_size", -1, ValueError),
    ("max_persistent_cache_size", float("nan"), ValueError),
    ("max_memory_cache_size", None, TypeError),
    ("max_memory_cache_size", float("inf"), ValueError),
    ("max_memory_cache_size", True, TypeError),
    ("memory_cache_device", 3.5, TypeError),
    ("memory_cache_device", "toaster", ValueError),
    ("cache_dtype", "float16", TypeError),
    ("cache_dtype", torch.int16, ValueError),
    ("cache_dtype", torch.float8_e8m0fnu, ValueError),
    ("cache_dtype", {"logits": "int8"}, TypeError),
    ("cache_dtype", {"logits": torch.int32}, ValueError),
    ("cache_dtype", {0: torch.int8}, TypeError),
    ("cache_dtype", ("logits", torch.int8), TypeError),
    ("cache_dtype", torch.complex64, ValueError),
    ("zstd_compression_level", "fast", TypeError),
    ("zstd_compression_level", True, TypeError),
    ("zstd_compression_level", 23, ValueError),
    ("zstd_compression_level", -101, ValueError),
    ("digest", "md5", ValueError),
    ("pure", None, TypeError),
    ("audit", True, TypeError),
    ("audit", 0.6, ValueError),
    ("audit", -0.1, ValueError),
    ("batch_dim", 1.0, TypeError),
    ("batch_dim", -1, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_wrong_values_are_refused_by_name(name, value, error):
    with pytest.raises(error, match=name):
        CacheOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_memory_cache_size", 0),
        ("zstd_compression_level", -100),
        ("zstd_compression_level", 22),
        ("zstd_compression_level", None),
        ("memory_cache_device", torch.device("cpu")),
        ("memory_cache_device", None),
        ("cache_dtype", torch.float8_e4m3fn),
        ("persistent_module_hash", "v1"),
    ],
)
def test_values_at_the_edge_are_taken(name, value):
    assert getattr(CacheOptions(**{name: value}), name) == value


def test_a_misspelt_option_is_corrected():
    with pytest.raises(TypeError, match="did you mean 'persistent'"):
        cached(persistant=True)
    with pytest.raises(TypeError, match="the options are"):
        cached(xyzzy=True)


def test_sizes_may_be_written_as_floats():
    assert CacheOptions(max_memory_cache_size=1e9).max_memory_cache_size == 1_000_000_000


def test_the_directory_comes_from_the_option_the_environment_or_the_platform(monkeypatch, tmp_path):
    assert CacheOptions().directory is None
    assert CacheOptions(persistent=True, persistent_cache_dir=tmp_path).directory == tmp_path
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path / "env"))
    assert CacheOptions(persistent=True).directory == tmp_path / "env"
    monkeypatch.delenv("TORCHCACHE_DIR")
    assert str(default_cache_dir()) == platformdirs.user_cache_dir("torchcache")


def test_signatures_show_the_options():
    for function in (cached, torchcache.mark):
        assert set(inspect.signature(CacheOptions).parameters) <= set(inspect.signature(function).parameters)


def test_an_instance_attribute_overrides_the_decorator(tmp_path):
    @cached(persistent=True)
    class Module(nn.Module):
        def __init__(self, directory):
            super().__init__()
            self.torchcache_persistent_cache_dir = directory
            self.linear = nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x):
            return self.linear(x)

    module = Module(tmp_path / "own")
    module(torch.randn(4, 3))
    torchcache.flush()
    assert (tmp_path / "own" / "torchcache.json").exists()
    module.torchcache_persistent_cache_dir = 3
    with pytest.raises(TypeError, match="persistent_cache_dir"):
        Module(3)(torch.randn(4, 3))


def test_blake3_serves_where_it_is_installed():
    pytest.importorskip("blake3")
    module = torchcache.mark(nn.Linear(3, 3), freeze=True, digest="blake3")
    x = torch.randn(4, 3)
    torch.testing.assert_close(module(x), module(x))
    assert torchcache.stats(module).hits == 4


def test_replacing_options_checks_names_and_values_and_leaves_the_old_ones():
    options = CacheOptions(pure=True)
    assert options.replace({}) == options
    assert options.replace({"persistent": True}) == CacheOptions(pure=True, persistent=True)
    assert not options.persistent
    with pytest.raises(TypeError, match="did you mean 'audit'"):
        options.replace({"adit": True})
    with pytest.raises(ValueError, match="max_memory_cache_size"):
        options.replace({"max_memory_cache_size": -1})


def test_the_directory_is_absolute_and_an_empty_variable_counts_as_unset(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert CacheOptions(persistent=True, persistent_cache_dir="rows").directory == tmp_path / "rows"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert CacheOptions(persistent=True, persistent_cache_dir="~/rows").directory == tmp_path / "rows"
    monkeypatch.setenv("TORCHCACHE_DIR", "")
    assert str(default_cache_dir()) == platformdirs.user_cache_dir("torchcache")


def test_overrides_of_one_instance_leave_its_class_alone():
    @cached
    class Scaled(nn.Module):
        def __init__(self, **overrides):
            super().__init__()
            for name, value in overrides.items():
                setattr(self, f"torchcache_{name}", value)

        def forward(self, x):
            return x * 2

    x = torch.randn(4, 3)
    plain, off, tiny = Scaled(), Scaled(enabled=False), Scaled(max_memory_cache_size=2 * 3 * 4)
    for module in (plain, off, tiny):
        for _ in range(2):
            assert torch.equal(module(x), x * 2)
    assert torchcache.stats(plain).hits == 4
    assert torchcache.stats(off).hits == torchcache.stats(off).misses == 0
    assert torchcache.stats(tiny).hits == 2
