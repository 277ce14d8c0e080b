"""Rows without their padding: found again in batches of any length, and right at real positions."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import torchcache

WORDS, WIDTH = 50, 16
SENTENCES = [
    torch.randint(1, WORDS, (1 + 5 * number % 29,), generator=torch.Generator().manual_seed(number))
    for number in range(24)
]


def padded(rows, *, left=False, blank=0, more=0, sentences=SENTENCES):
    """Token ids and mask of some sentences, as long as the longest of them."""
    width = max(len(sentences[row]) for row in rows) + more
    ids, mask = torch.full((len(rows), width), blank), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        length = len(sentences[row])
        where = slice(width - length, width) if left else slice(0, length)
        ids[place, where], mask[place, where] = sentences[row], 1
    return ids, mask


def epochs(count, size=5, seed=0):
    """Batches of some epochs, each shuffled."""
    generator = torch.Generator().manual_seed(seed)
    return [list(torch.randperm(len(SENTENCES), generator=generator).split(size)) for _ in range(count)]


class Encoder(nn.Module):
    """Attention with positions, masked; tokens and their mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        x = self.layer(x, src_key_padding_mask=attention_mask == 0)
        weights = attention_mask[..., None].to(x.dtype)
        return {"tokens": x, "mean": (x * weights).sum(1) / weights.sum(1)}


def marked(module, **options):
    return torchcache.mark(copy.deepcopy(module), freeze=True, **{"padding": "attention_mask", **options})


def assert_same(got, expected, mask):
    real = mask.bool()
    for name in expected:
        if expected[name].ndim == 3:
            assert got[name].shape == expected[name].shape
            torch.testing.assert_close(got[name][real], expected[name][real], atol=1e-5, rtol=1e-4)
            assert not got[name][~real].any()
        else:
            torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


DOORS = {
    "call": lambda model: model,
    "transform": torchcache.transform,
    "compile": lambda model: torch.compile(model, backend=torchcache.torchcache_backend, options={"inner": "eager"}),
    "compile_other": lambda model: torch.compile(model, backend="aot_eager"),
}


@pytest.mark.parametrize("door", DOORS)
def test_batches_padded_to_their_longest_are_found_again(door):
    plain = Encoder().eval().requires_grad_(False)
    module = marked(plain)
    model = DOORS[door](module)
    for epoch in epochs(3):
        for rows in epoch:
            ids, mask = padded(rows)
            assert_same(model(ids, mask), plain(ids, mask), mask)
    stats = torchcache.stats(module)
    assert stats.misses <= len(SENTENCES) + stats.bypasses
    assert stats.hits >= 2 * len(SENTENCES) - 5
    assert not stats.regions[0].reasons.keys() - {
        "its rows are all alike so far, so that it cannot be told whether they depend on each other"
    }


def test_another_process_finds_rows_of_other_batches_and_less_is_stored(tmp_path):
    plain = Encoder().eval().requires_grad_(False)
    options = {"persistent": True, "persistent_cache_dir": tmp_path, "zstd_compression_level": None}
    for run in range(2):
        module = marked(plain, **options)
        for rows in epochs(2, size=8, seed=run)[run]:
            ids, mask = padded(rows)
            assert_same(module(ids, mask), plain(ids, mask), mask)
        torchcache.flush()
    assert torchcache.stats(module).regions[0].disk_hits == len(SENTENCES)
    real = sum(-(-len(sentence) // 8) * 8 for sentence in SENTENCES)
    stored = torchcache.stats(module).regions[0]
    assert stored.memory_bytes < 1.3 * 4 * WIDTH * (real + len(SENTENCES))


def tiny(kind, **more):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")
    if kind == "T5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
        return transformers.T5EncoderModel(config(vocab_size=WORDS, **sizes))
    if kind == "CLIPText":
        return transformers.CLIPTextModel(config(vocab_size=WORDS, **sizes, eos_token_id=WORDS - 1))
    return getattr(transformers, f"{kind}Model")(config(vocab_size=WORDS, **sizes, **more))


MODELS = {
    "bert": ("Bert", {}, False, 0),
    "roberta": ("Roberta", {}, False, 1),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}, False, 0),
    "t5": ("T5", {}, False, 0),
    "clip": ("CLIPText", {}, False, 0),
    "esm": (
        "Esm",
        {"pad_token_id": 1, "mask_token_id": 2, "token_dropout": True, "position_embedding_type": "rotary"},
        False,
        1,
    ),
    "llama_left": ("Llama", {"use_cache": False, "num_key_value_heads": 2}, True, 0),
    "qwen2_right": ("Qwen2", {"use_cache": False, "num_key_value_heads": 2}, False, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_text_encoders_of_transformers(name):
    kind, more, left, blank = MODELS[name]
    plain = tiny(kind, **more).eval().requires_grad_(False)
    module = marked(plain)
    for epoch in epochs(2, size=8):
        for rows in epoch:
            ids, mask = padded(rows, left=left, blank=blank)
            expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state
            got = module(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-3)
    assert torchcache.stats(module).hits >= len(SENTENCES) - 3, torchcache.stats(module)


def test_token_ids_and_inverted_masks_tell_padding_too():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(WORDS, WIDTH)

        def forward(self, ids):
            return self.words(ids)

    plain = Words().eval().requires_grad_(False)
    module = marked(plain, padding="ids", padding_value=7)
    sentences = [torch.where(sentence == 7, 8, sentence) for sentence in SENTENCES]
    for rows in ([1, 2, 3], [3, 4, 5, 1], [2, 5]):
        ids, mask = padded(rows, blank=7, sentences=sentences)
        got, expected = module(ids), plain(ids)
        assert torch.equal(got[mask.bool()], expected[mask.bool()])
    assert torchcache.stats(module).hits == 4

    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0).eval().requires_grad_(False)
    module = marked(layer, padding="src_key_padding_mask", padding_value=True)
    x, blank = torch.randn(len(SENTENCES), 40, WIDTH), torch.randn(WIDTH)
    for rows in (range(8), [3, 4, 5, 1], [2, 5]):
        _, mask = padded(rows)
        given = torch.where(mask[..., None] == 1, x[list(rows)][:, : mask.shape[1]], blank)
        got, expected = (one(given, src_key_padding_mask=mask == 0) for one in (module, layer))
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    assert torchcache.stats(module).hits >= 3


class Forgets(Encoder):
    """Something of the padding leaks."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, input_ids, attention_mask):
        made = super().forward(input_ids, attention_mask)
        x = made["tokens"]
        if self.how == "mean over all":
            return {"tokens": x, "mean": x.mean(1)}
        if self.how == "from the end":
            return {"tokens": x + torch.arange(x.shape[1], 0, -1)[:, None]}
        if self.how == "halves":
            return {"tokens": nn.functional.avg_pool1d(x.mT, 2).mT}
        if self.how == "a number":
            return {"tokens": x, "length": x.shape[1]}
        if self.how == "long ones":
            return {"tokens": x + (x.shape[1] > 16) * x.abs().sum((1, 2), keepdim=True)}
        if self.how == "position first":
            return {"tokens": x.transpose(0, 1)}
        return made


@pytest.mark.parametrize("how", ["mean over all", "from the end", "halves", "a number", "long ones", "position first"])
def test_where_padding_shows_the_original_answers_and_that_is_said(how, warnings):
    plain = Forgets(how).eval().requires_grad_(False)
    module = marked(plain)
    for rows in [[1, 7, 2], [2, 1, 7], [3, 5, 4], [4, 3, 5], [6, 10, 5, 11], [11, 5, 10, 6]]:
        ids, mask = padded(rows)
        got, expected = module(ids, mask), plain(ids, mask)
        for name in expected:
            if isinstance(expected[name], torch.Tensor) and how != "long ones":
                assert torch.equal(got[name], expected[name])
        if how == "long ones":
            real = mask.bool()
            torch.testing.assert_close(got["tokens"][real], expected["tokens"][real], atol=1e-5, rtol=1e-4)
    assert len(warnings) == 1
    assert "padding" in warnings[0] or "length" in warnings[0] or "row" in warnings[0]
    assert torchcache.stats(module).bypasses


def test_a_feature_as_wide_as_the_batch_is_long_is_not_cut():
    class WithFeatures(Encoder):
        def __init__(self):
            super().__init__()
            self.side = nn.Linear(12, WIDTH)

        def forward(self, input_ids, attention_mask, features):
            return {"mean": super().forward(input_ids, attention_mask)["mean"] + self.side(features)}

    plain = WithFeatures().eval().requires_grad_(False)
    module = marked(plain)
    features = torch.randn(len(SENTENCES), 12)
    for more in (0, 12 - 11, 3):  # rows 2 and 7 are as long as 11 and 7: padded to 11, to 12, to 14
        rows = [2, 7]
        ids, mask = padded(rows, more=more)
        for _ in range(2):
            assert_same(module(ids, mask, features[rows]), plain(ids, mask, features[rows]), mask)
    assert torchcache.stats(module).hits


def test_rows_padded_in_the_middle_are_computed():
    plain = Encoder().eval().requires_grad_(False)
    module = marked(plain)
    ids, mask = padded([3, 4, 5])
    mask[0, 0], mask[1, -1] = 0, 0
    for _ in range(2):
        assert_same(module(ids, mask), plain(ids, mask), torch.ones_like(mask))
    assert torchcache.stats(module).bypasses == 6


def test_without_the_argument_all_positions_count(warnings):
    plain = Encoder().eval().requires_grad_(False)
    module = marked(plain)
    ids = torch.stack([SENTENCES[row][:6] for row in (1, 2, 3)])
    for _ in range(2):
        torch.testing.assert_close(module(ids)["tokens"], plain(ids)["tokens"], atol=1e-5, rtol=1e-4)
    assert torchcache.stats(module).hits == 3
    assert ["all positions count" in text for text in warnings] == [True]


def test_no_row_is_made_longer_than_any_batch_was():
    """A model has room for some positions only, and one that is asked for more can end more than the call."""

    longest = max(map(len, SENTENCES))

    class Short(Encoder):
        def __init__(self):
            super().__init__()
            self.places = nn.Embedding(longest, WIDTH)

    assert longest % 8
    plain = Short().eval().requires_grad_(False)
    module = marked(plain)
    for epoch in epochs(4):
        for rows in epoch:
            ids, mask = padded(rows)
            assert_same(module(ids, mask), plain(ids, mask), mask)
    assert torchcache.stats(module).hits >= 2 * len(SENTENCES)
    assert not any("run on rows" in reason for reason in torchcache.stats(module).regions[0].reasons)


def test_rows_alone_of_several_lengths():
    plain = Encoder().eval().requires_grad_(False)
    module = marked(plain, padding=None)
    for _ in range(2):
        for row in range(8):
            ids = SENTENCES[row][None]
            torch.testing.assert_close(module(ids)["mean"], plain(ids)["mean"], atol=1e-5, rtol=1e-4)
    assert torchcache.stats(module).hits


def test_rows_that_depend_on_each_other_are_the_error_that_they_are():
    class Centred(Encoder):
        def forward(self, input_ids, attention_mask):
            mean = super().forward(input_ids, attention_mask)["mean"]
            return {"mean": mean - mean.mean(0)}

    with pytest.raises(torchcache.RowwiseError, match="the other rows of the batch"):
        marked(Centred())(*padded([0, 1], more=10))


def test_ids_of_samples_are_taken_apart_with_the_batch():
    plain = Encoder().eval().requires_grad_(False)
    module = marked(plain)
    for rows in ([1, 2, 3, 4], [4, 1], [3, 2]):
        ids, mask = padded(rows)
        with torchcache.sample_keys(rows):
            assert_same(module(ids, mask), plain(ids, mask), mask)
    assert torchcache.stats(module).hits == 4
    ids, mask = padded([1, 2])
    with pytest.raises(torchcache.SampleKeyError, match=r"3 ids.*batch of 2 rows"), torchcache.sample_keys([1, 2, 3]):
        marked(plain)(ids, mask)


def test_changed_weights_and_gradients():
    plain = Encoder()
    module = marked(plain)
    plain.eval().requires_grad_(False)
    ids, mask = padded([1, 2, 3])
    module(ids, mask)
    for model in (plain, module):
        model.words.weight.data.mul_(1.5)
    assert_same(module(ids, mask), plain(ids, mask), mask)
    module.words.weight.requires_grad_(True)
    module(ids, mask)["mean"].sum().backward()
    assert module.words.weight.grad is not None


def test_what_cannot_be_an_option_is_said():
    for options, text in (
        ({"padding": 3}, "padding must be"),
        ({"padding_value": 1}, "without padding"),
        ({"padding": "mask", "batch_dim": 1}, "batch_dim must be 0"),
        ({"padding": "mask", "padding_value": "pad"}, "padding_value must be"),
        ({"padding": "mask", "cache_dtype": torch.int8}, "cache_dtype must be a dtype that is cast"),
        ({"padding": "mask", "cache_dtype": {"mean": torch.float8_e4m3fn}}, "cache_dtype must be a dtype that is cast"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            torchcache.mark(Encoder(), **options)


def test_a_model_that_begins_to_look_at_padding_is_caught_by_the_audit(warnings):
    class Later(Encoder):
        def forward(self, input_ids, attention_mask):
            made = super().forward(input_ids, attention_mask)
            odd = attention_mask.shape[1] % 2 and (attention_mask == 0).any()
            return {"mean": made["mean"] + 1} if odd else {"mean": made["mean"] * 1}

    plain = Later().eval().requires_grad_(False)
    module = marked(plain, audit=0.5)
    module(*padded([2, 7], more=1))  # as long as 12: nothing is odd
    wrong = 0
    for _ in range(10):
        ids, mask = padded([2, 7])
        wrong += not torch.allclose(module(ids, mask)["mean"], plain(ids, mask)["mean"], atol=1e-4)
    assert wrong < 5
    assert sum("depends on the padding" in text for text in warnings) == 1


def test_a_model_that_another_length_changes_is_left_as_it_was(warnings):
    class Switches(Encoder):
        def __init__(self):
            super().__init__()
            self.sparse = True

        def forward(self, input_ids, attention_mask):
            if input_ids.shape[1] < 12:
                self.sparse = False
            made = super().forward(input_ids, attention_mask)
            return {"mean": made["mean"] * (2 if self.sparse else 1)}

    plain = Switches().eval().requires_grad_(False)
    module = marked(plain)
    for _ in range(5):
        ids, mask = padded([0, 3], more=8)
        assert_same(module(ids, mask), plain(ids, mask), mask)
    assert module.sparse
    assert sum("writes to sparse" in text for text in warnings) == 1


class Counted(Encoder):
    """Counts its calls, and lacks memory when it is told to."""

    def __init__(self):
        super().__init__()
        self.calls, self.lacking = 0, 0

    def forward(self, input_ids, attention_mask):
        self.calls += 1
        if self.lacking and input_ids.shape[1] < self.lacking:
            raise torch.OutOfMemoryError("no memory")
        return {"mean": super().forward(input_ids, attention_mask)["mean"]}


def test_without_audits_nothing_that_is_served_is_computed():
    module = marked(Counted(), audit=0.0, pure=True)
    batch, calls = padded([2, 7, 9]), []
    for _ in range(4):
        module(*batch)
        calls.append(module.calls)
    assert calls[1] - calls[0] <= 3  # how a row that was alone lies in memory is seen when it is served first
    assert calls[1] == calls[2] == calls[3]


def test_a_lack_of_memory_is_no_reason_for_later_calls():
    module = marked(Counted(), pure=True, persistent_module_hash="counted")
    batch = padded([2, 7, 9])
    module.lacking = 12
    module(*batch)
    assert torchcache.stats(module).bypasses == 3
    module.lacking = 0
    for _ in range(2):
        module(*batch)
    assert torchcache.stats(module).hits == 3


def test_two_texts_of_one_length_are_not_cut_by_each_others_mask():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()

        def forward(self, query, query_mask, passage, passage_mask):
            return {"both": self.encoder(query, query_mask)["mean"] + self.encoder(passage, passage_mask)["mean"]}

    plain = Pair().eval().requires_grad_(False)
    module = marked(plain, padding="query_mask")
    longer = [row for row in range(24) if len(SENTENCES[row]) >= 20]
    for rows, others in (([longer[0], 2], [3, 1]), ([longer[1], 3], [longer[2], longer[0]]), ([2, 3], [longer[0], 5])):
        width = 30
        query, passage = (
            [nn.functional.pad(part, (0, width - part.shape[1])) for part in padded(some)] for some in (rows, others)
        )
        for _ in range(2):
            assert_same(module(*query, *passage), plain(*query, *passage), query[1])


class TwoSequences(nn.Module):
    """Tokens that have a mask, and something else that has as many places, or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.other = nn.Embedding(WORDS, WIDTH), nn.Linear(3, WIDTH)

    def forward(self, ids, mask, other):
        return {"tokens": self.words(ids) * mask[..., None], "other": self.other(other)}


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_another_sequence_of_the_same_length_is_not_cut(data):
    """In whichever batches it happens to be as long as the mask, and whatever it holds: but what padding holds."""
    plain = TwoSequences().eval().requires_grad_(False)
    module = marked(plain, padding="mask")
    length = data.draw(st.sampled_from([7, 12, 15]))
    kinds = {"any": torch.randn, "flags": lambda *shape: torch.rand(*shape).gt(0.3).float(), "ones": torch.ones}
    make = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    for _ in range(4):
        rows = data.draw(st.lists(st.integers(0, len(SENTENCES) - 1), min_size=2, max_size=5, unique=True))
        ids, mask = padded(rows)
        more = max(0, length - ids.shape[1])
        ids, mask = nn.functional.pad(ids, (0, more)), nn.functional.pad(mask, (0, more))
        other = make(len(rows), length, 3)
        for _ in range(2):
            got, expected = module(ids, mask, other), plain(ids, mask, other)
            torch.testing.assert_close(got["other"], expected["other"], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(got["tokens"], expected["tokens"], atol=1e-5, rtol=1e-4)


def test_an_end_of_text_that_is_also_padding_is_computed_where_the_mask_says_otherwise():
    end = WORDS - 1

    class Last(Encoder):
        def forward(self, input_ids, attention_mask):
            return {"tokens": super().forward(input_ids, attention_mask)["tokens"]}

    plain = Last().eval().requires_grad_(False)
    module = marked(plain, padding="input_ids", padding_value=end)
    for rows in ([1, 2, 3], [4, 5, 6], [2, 2, 2], [3, 1]):
        ids, mask = padded(rows, blank=end, more=1)
        for row, other in enumerate(rows):
            ids[row, len(SENTENCES[other])], mask[row, len(SENTENCES[other])] = end, 1
        got, expected = module(ids, mask)["tokens"], plain(ids, mask)["tokens"]
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    assert "holds more than padding where 'input_ids' says padding" in str(torchcache.stats(module))


def test_padding_of_any_one_value_is_known_once_there_is_enough_of_it():
    plain = Placed().eval().requires_grad_(False)
    module = marked(plain, padding="mask")
    for epoch in epochs(3):
        for rows in epoch:
            ids, mask = padded(rows, left=True)
            places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
            got, expected = module(ids, mask, places), plain(ids, mask, places)
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])
    assert torchcache.stats(module).hits >= len(SENTENCES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_a_lower_precision_are_no_leak_of_padding(dtype, warnings):
    plain = Encoder().eval().requires_grad_(False)
    module = marked(plain, cache_dtype=dtype, audit=0.5)
    for epoch in epochs(8):
        for rows in epoch:
            ids, mask = padded(rows)
            got, expected = module(ids, mask)["mean"], plain(ids, mask)["mean"]
            torch.testing.assert_close(got, expected, atol=0.2, rtol=0.1)
    stats = torchcache.stats(module)
    assert stats.hits >= 6 * len(SENTENCES)
    assert not any("padding" in text for text in warnings)


class Placed(nn.Module):
    """Its positions are an argument."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)

    def forward(self, ids, mask, places):
        return self.words(ids) + self.places(places)


@pytest.mark.parametrize("expanded", [False, True])
def test_numbers_of_positions_are_no_other_sequence(expanded):
    plain = Placed().eval().requires_grad_(False)
    module = marked(plain, padding="mask")
    for epoch in [*epochs(3), [[row] for row in range(8)]]:  # the last of them one row at a time
        for rows in epoch:
            ids, mask = padded(rows)
            places = torch.arange(ids.shape[1]).expand(len(rows) if expanded else 1, -1)
            got, expected = module(ids, mask, places), plain(ids, mask, places)
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])
    stats = torchcache.stats(module)
    assert stats.hits >= (2 if expanded else 1.5) * len(SENTENCES)  # of one row nobody knows what is shared
    assert not stats.bypasses


class Queries(nn.Module):
    """A sequence that all rows share, and that has nothing to do with the mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, mask, queries):
        text = (self.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.out(queries) + text[:, None]


def test_a_shared_sequence_of_the_same_length_is_not_cut():
    plain = Queries().eval().requires_grad_(False)
    module, queries = marked(plain, padding="mask"), torch.randn(1, 12, WIDTH)
    for rows in ([2, 7], [7, 2], [3, 4, 5], [1, 6], [2, 3]):
        ids, mask = padded(rows)
        more = max(0, 12 - ids.shape[1])
        ids, mask = nn.functional.pad(ids, (0, more)), nn.functional.pad(mask, (0, more))
        torch.testing.assert_close(module(ids, mask, queries), plain(ids, mask, queries))


def test_rows_of_padding_alone():
    plain = Encoder().eval().requires_grad_(False)
    module = marked(plain)
    ids, mask = padded([1, 2, 3])
    mask[1], ids[1] = 0, 0
    for _ in range(2):
        got, expected = module(ids, mask), plain(ids, mask)
        for row in (0, 2):
            torch.testing.assert_close(got["mean"][row], expected["mean"][row], atol=1e-5, rtol=1e-4)
        assert torch.equal(got["mean"][1].isnan(), expected["mean"][1].isnan())


def test_under_autocast_and_in_inference_mode():
    plain = Encoder().eval().requires_grad_(False)
    module = marked(plain)
    for rows in ([1, 2, 3, 4], [4, 1], [3, 2]):
        ids, mask = padded(rows)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = module(ids, mask)["mean"], plain(ids, mask)["mean"]
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
        with torch.inference_mode():
            assert_same(module(ids, mask), plain(ids, mask), mask)
    assert torchcache.stats(module).hits


def test_long_texts_through_a_loader_of_ours():
    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return len(SENTENCES)

        def __getitem__(self, index):
            ids = nn.functional.pad(SENTENCES[index].repeat(6), (0, 180))[:180]
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    class Long(Encoder):
        def __init__(self):
            super().__init__()
            self.places = nn.Embedding(256, WIDTH)

    plain = Long().eval().requires_grad_(False)
    module, loader = marked(plain), torchcache.DataLoader(Texts(), batch_size=6)
    for _ in range(4):
        for batch in loader:
            got = module(**batch)
            assert_same(got, plain(**{name: value + 0 for name, value in batch.items()}), batch["attention_mask"] + 0)
    assert torchcache.stats(module).hits >= 60


PROPERTY = None


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.lists(st.integers(0, 23), min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(0, 11), min_size=5, max_size=5),
)
def test_any_batches_with_any_padding_are_right(batches, more):
    global PROPERTY
    if PROPERTY is None:
        plain = Encoder().eval().requires_grad_(False)
        PROPERTY = plain, marked(plain)
    plain, module = PROPERTY
    for rows, extra in zip(batches, more, strict=False):
        ids, mask = padded(rows, more=extra)
        assert_same(module(ids, mask), plain(ids, mask), mask)


class Unwrapped(Encoder):
    """One row alone comes in a structure, or with values, of its own."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, input_ids, attention_mask=None):
        found = super().forward(input_ids, attention_mask)["tokens"]
        return self.other(found) if len(input_ids) == 1 else found


@pytest.mark.parametrize("other", [lambda y: (y,), lambda y: y[0], lambda y: y * 2], ids=["tuple", "row", "twice"])
def test_a_row_alone_that_comes_out_otherwise_is_in_no_batch(other):
    plain = Unwrapped(other).eval()
    module = marked(plain)
    for batches in epochs(3, 2):
        for rows in batches:
            ids, mask = padded(rows.tolist())
            found, expected = module(input_ids=ids, attention_mask=mask), plain(input_ids=ids, attention_mask=mask)
            assert type(found) is type(expected)
            torch.testing.assert_close(found * mask[..., None], expected * mask[..., None], rtol=1e-4, atol=1e-5)
