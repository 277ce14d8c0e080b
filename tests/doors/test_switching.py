"""Code written for PyPI's torchcache 0.6.0 runs here: its decorator, its options and its attributes."""

import pytest
import torch
from torch import nn

import torchcache as package
from torchcache import CacheOptions, torchcache

X = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
Y = torch.tensor([[7.0, 8, 9], [10, 11, 12]])
FORMER = {"subsample_count": 100, "zstd_compression_threads": 4, "use_mmap_on_load": True}


class Doubling(nn.Module):
    """A module without parameters, in training mode, as it is made."""

    def forward(self, x):
        return x * 2


def doubling(attributes=None, **options):
    """An instance of a decorated class; ``attributes`` are set in its ``__init__``."""

    @torchcache(**options)
    class Cached(Doubling):
        def __init__(self):
            super().__init__()
            for name, value in (attributes or {}).items():
                setattr(self, f"torchcache_{name}", value)

    return Cached()


def counts(module):
    found = package.stats(module)
    return found.hits, found.misses


def on_disk(folder, **options):
    """Bytes of compressible rows."""
    wide = doubling(persistent=True, persistent_cache_dir=folder, **options)
    wide(torch.ones(4, 50_000) * torch.arange(4)[:, None])
    package.flush()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_class_is_cached_row_by_row_and_in_batches_of_any_size():
    module = doubling()
    assert torch.equal(module(X), X * 2)
    assert torch.equal(module(X), X * 2)
    both = torch.cat([Y, X])
    assert torch.equal(module(both), both * 2)
    assert counts(module) == (4, 4)


def test_rows_are_there_for_a_new_instance_of_a_class_of_the_same_code(tmp_path):
    for hits in (0, 2):
        module = doubling(persistent=True, persistent_cache_dir=tmp_path)
        assert torch.equal(module(X), X * 2)
        package.flush()
        assert counts(module) == (hits, 2 - hits)


def test_instances_of_one_class_share_rows_on_disk_and_one_may_be_left_out(tmp_path):
    @torchcache(persistent=True, persistent_cache_dir=str(tmp_path))
    class Cached(Doubling):
        def __init__(self, cache=True):
            super().__init__()
            self.torchcache_enabled = cache

    first, second, plain = Cached(), Cached(), Cached(cache=False)
    for module in (first, second, plain):
        assert torch.equal(module(X), X * 2)
        package.flush()
    assert counts(first) == (0, 2)
    assert counts(second) == (2, 0)
    assert counts(plain) == (0, 0)


@pytest.mark.parametrize("seen", [1, 2])
def test_several_inputs_and_plain_values_are_parts_of_the_key(seen):
    @torchcache()
    class Mixed(nn.Module):
        def forward(self, x, y, scale=1, *, name="a"):
            return x * scale + y * len(name)

    module = Mixed()
    for _ in range(seen):
        assert torch.equal(module(X, Y), X + Y)
        assert torch.equal(module(X, Y, 3), 3 * X + Y)
        assert torch.equal(module(x=X, y=Y, name="bb"), X + 2 * Y)
        assert torch.equal(module(Y, X), X + Y)


def test_a_function_is_cached_and_its_code_is_part_of_the_key(tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path}

    @torchcache(**options)
    def tripled(x):
        return x * 3

    @torchcache(**options)
    def shifted(x):
        return x + 5

    for function, expected in ((tripled, X * 3), (shifted, X + 5), (tripled, X * 3)):
        assert torch.equal(function(X), expected)
    assert tripled.__name__ == "tripled"
    assert counts(tripled) == (2, 2)
    with pytest.raises(package.MarkError):
        torchcache()(3)


def appending():
    calls = []

    def counted(x):
        calls.append(len(x))
        return x * 3

    return counted


def assigning():
    calls = 0

    def counted(x):
        nonlocal calls
        calls += 1
        return x * 3

    return counted


def keeping():
    last = {}

    def counted(x):
        def keep():
            last["count"] = last.get("count", 0) + 1

        keep()
        return x * 3

    return counted


@pytest.mark.parametrize("make", [appending, assigning, keeping])
@pytest.mark.parametrize(("promise", "expected"), [(False, (0, 0)), (True, (4, 2))])
def test_a_function_that_counts_its_calls_is_cached_with_a_promise_only(make, promise, expected):
    function = torchcache(pure=promise)(make())
    for _ in range(3):
        assert torch.equal(function(X), X * 3)
    assert counts(function) == expected


def test_attributes_of_an_instance_override_the_decorator(tmp_path):
    module = doubling({"persistent": True, "persistent_cache_dir": tmp_path, "cache_dtype": torch.half})
    assert torch.equal(module(X), X * 2)
    package.flush()
    assert (tmp_path / "torchcache.json").exists()


def test_attributes_of_a_class_override_the_decorator(tmp_path):
    @torchcache()
    class Cached(Doubling):
        torchcache_persistent = True

        @property
        def torchcache_persistent_cache_dir(self):
            return tmp_path

    class Left(Cached):
        torchcache_enabled = False

    module, left = Cached(), Left()
    for _ in range(2):
        assert torch.equal(module(X), X * 2)
        assert torch.equal(left(X), X * 2)
    package.flush()
    assert (tmp_path / "torchcache.json").exists()
    assert counts(module) == (2, 2)
    assert counts(left) == (0, 0)


def test_what_trains_behind_a_cached_module_gets_its_gradients():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.randn(3, 5)

        def forward(self, x):
            return x @ self.weight

    frozen, head = torchcache()(Frozen)(), nn.Linear(5, 2)
    for _ in range(2):
        head.zero_grad()
        torch.testing.assert_close(frozen(X), X @ frozen.weight)
        head(frozen(X)).sum().backward()
        torch.testing.assert_close(head.weight.grad, (X @ frozen.weight).sum(0).expand(2, 5))


def test_a_module_that_trains_is_computed_and_not_refused():
    @torchcache()
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return x @ self.weight

    module = Trained()
    for count in (1, 2):
        module(X).sum().backward()
        torch.testing.assert_close(module.weight.grad, count * X.sum(0)[:, None].expand(3, 5))
    assert counts(module) == (0, 0)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
@pytest.mark.parametrize("dtype", [None, torch.half, torch.float64])
def test_rows_are_stored_in_a_dtype_and_given_back_in_their_own(tmp_path, device, dtype):
    options = {"persistent": True, "persistent_cache_dir": tmp_path, "cache_dtype": dtype}
    for _ in range(2):
        module = doubling(memory_cache_device=device, **options)
        for _ in range(2):
            assert module(X).dtype == X.dtype
            assert torch.equal(module(X), X * 2)
        package.flush()


@pytest.mark.parametrize(("name", "hits"), [("v1", 2), (None, 0)])
def test_a_module_hash_of_ones_own_stands_for_the_code(tmp_path, name, hits):
    options = {"persistent": True, "persistent_cache_dir": tmp_path, "persistent_module_hash": name}
    doubling(**options)(X)
    package.flush()

    @torchcache(**options)
    class Rewritten(nn.Module):
        def forward(self, x):
            return x + x

    module = Rewritten()
    assert torch.equal(module(X), X * 2)
    assert counts(module) == (hits, 2 - hits)


def test_full_caches_compute_what_they_cannot_hold(tmp_path, warnings):
    module = doubling(
        persistent=True, persistent_cache_dir=tmp_path, max_persistent_cache_size=2400.0, max_memory_cache_size=20
    )
    for _ in range(3):
        for batch in (X, Y):
            assert torch.equal(module(batch), batch * 2)
    package.flush()
    assert package.stats(module).regions[0].memory_bytes <= 20


@pytest.mark.parametrize("name", FORMER)
@pytest.mark.parametrize("way", ["decorator", "mark", "instance", "class"])
def test_former_options_are_taken_and_say_once_what_they_mean(name, way, warnings):
    value = FORMER[name]
    if way == "decorator":
        make = lambda: doubling(**{name: value})  # noqa: E731
    elif way == "mark":
        make = lambda: package.mark(Doubling(), **{name: value})  # noqa: E731
    elif way == "instance":
        make = lambda: doubling({name: value})  # noqa: E731
    else:
        make = torchcache()(type("Cached", (Doubling,), {f"torchcache_{name}": value}))
    for _ in range(2):
        module = make()
        for _ in range(2):
            assert torch.equal(module(X), X * 2)
        assert counts(module) == (2, 2)
    (said,) = [text for text in warnings if "0.6.0" in text]
    assert name in said
    assert "has no effect here, since" in said
    assert "\n" not in said


def test_compression_on_and_off_as_before(tmp_path, warnings):
    raw = on_disk(tmp_path / "raw", zstd_compression=False, zstd_compression_level=3)
    small = on_disk(tmp_path / "small", zstd_compression=True, zstd_compression_level=-50)
    assert raw > 800_000
    assert small < raw / 3
    assert on_disk(tmp_path / "attribute", attributes={"zstd_compression": False}) > 800_000
    said = [text for text in warnings if "0.6.0" in text]
    assert said == [
        "zstd_compression=False of torchcache 0.6.0 is zstd_compression_level=None here: write that",
        "zstd_compression=True of torchcache 0.6.0 is zstd_compression_level=-50 here: write that",
    ]


@pytest.mark.parametrize(
    ("given", "changes", "level"),
    [
        ({"zstd_compression": False}, {}, None),
        ({"zstd_compression": True}, {}, 1),
        ({"zstd_compression": True, "zstd_compression_level": 11}, {}, 11),
        ({"zstd_compression": False, "zstd_compression_level": 11}, {}, None),
        ({"zstd_compression": False}, {"zstd_compression": True}, 1),
        ({"zstd_compression_level": 11}, {"zstd_compression": True}, 11),
        ({"zstd_compression": True}, {"zstd_compression": False}, None),
        ({"zstd_compression": True}, {"zstd_compression_level": 5}, 5),
    ],
)
def test_compression_is_a_level(given, changes, level):
    assert CacheOptions.of(given).replace(changes).zstd_compression_level == level


def test_compression_is_true_or_false():
    with pytest.raises(TypeError, match="zstd_compression must be True or False, not 3"):
        torchcache(zstd_compression=3)
