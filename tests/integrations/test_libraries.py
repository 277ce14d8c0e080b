"""Libraries that people take frozen models from: trained as their documentation does, with a cache and without."""

import copy
import random

import pytest
import torch
from torch import nn

import torchcache

SAMPLES, BATCH, EPOCHS = 24, 8, 4
IMAGE = 32
LENGTH, WORDS, END = 12, 60, 59
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
SEEING = {"image_size": IMAGE, "patch_size": 8}


@pytest.fixture
def pictures():
    return torch.randn(SAMPLES, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def captions():
    words = torch.randint(1, END - 1, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(2))
    words[:, -1] = END
    return words


LABELS = torch.arange(SAMPLES) % 3


def shuffled():
    """The indices of every batch: another order in each epoch, the same in each run."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(EPOCHS):
        yield from torch.randperm(SAMPLES, generator=generator).split(BATCH)


def trained(model, loss_of):
    """The loss of every step of a training run."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    torch.manual_seed(4)
    for rows in shuffled():
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_each_row_is_computed_once(model, regions=1):
    stats = torchcache.stats(model)
    assert len(stats.regions) == regions
    counted = [(region.misses, region.hits, region.bypasses) for region in stats.regions]
    assert counted == [(SAMPLES, SAMPLES * (EPOCHS - 1), 0)] * regions


def assert_trains_the_same(losses, expected):
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len({round(loss, 4) for loss in losses}) > EPOCHS, "it learns"


def test_timm_classifier_on_frozen_features(pictures):
    timm = pytest.importorskip("timm")

    def run(cached):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=IMAGE, num_classes=3).requires_grad_(False)
        model.get_classifier().requires_grad_(True)
        if cached:
            torchcache.mark(model.forward_features)
        model.train()
        return model, trained(model, lambda rows: nn.functional.cross_entropy(model(pictures[rows]), LABELS[rows]))

    model, losses = run(cached=True)
    assert_trains_the_same(losses, run(cached=False)[1])
    assert_each_row_is_computed_once(model)


@pytest.mark.parametrize("marked", ["backbone", "all"])
def test_peft_adapters_in_the_last_blocks(pictures, marked):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

    def run(cached):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **SEEING, num_labels=3))
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3],
            modules_to_save=["classifier"],
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
        if cached:
            torchcache.mark(model if marked == "all" else model.base_model.model.vit)
            torchcache.transform(model)
        model.train()
        return model, trained(model, lambda rows: model(pixel_values=pictures[rows], labels=LABELS[rows]).loss)

    model, losses = run(cached=True)
    assert_trains_the_same(losses, run(cached=False)[1])
    assert_each_row_is_computed_once(model)


def test_accelerate_with_a_loader_and_a_scheduler(pictures):
    accelerate = pytest.importorskip("accelerate")

    def run(cached):
        torch.manual_seed(0)
        accelerate.utils.set_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.GELU(), nn.Flatten(), nn.Linear(128, 16))
        model = nn.Sequential(backbone.requires_grad_(False), nn.Linear(16, 3))
        if cached:
            torchcache.mark(model[0])
        data = torch.utils.data.TensorDataset(pictures, LABELS)
        loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
        optimizer = torch.optim.AdamW(model[1].parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        prepared, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        losses = []
        for _ in range(EPOCHS):
            for x, y in loader:
                with accelerator.accumulate(prepared):
                    loss = nn.functional.cross_entropy(prepared(x), y)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return accelerator.unwrap_model(prepared), losses

    model, losses = run(cached=True)
    assert_trains_the_same(losses, run(cached=False)[1])
    assert_each_row_is_computed_once(model)


QUANTIZED = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "IntxWeightOnlyConfig"]


def quantized(config, seed=0):
    """A frozen backbone with weights of torchao's, and a head that trains."""
    transformers = pytest.importorskip("transformers")
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(seed)
    backbone = transformers.ViTModel(transformers.ViTConfig(**SMALL, **SEEING)).eval().requires_grad_(False)
    torchao.quantize_(backbone, getattr(torchao, config)())
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(32, 3)})


@pytest.mark.parametrize("config", QUANTIZED)
def test_torchao_head_on_a_quantized_backbone(pictures, config):
    def run(cached, **options):
        model = quantized(config)
        if cached:
            torchcache.mark(model["backbone"], **options)

        def loss_of(rows):
            logits = model["head"](model["backbone"](pictures[rows]).pooler_output)
            return nn.functional.cross_entropy(logits, LABELS[rows])

        return model, trained(model, loss_of)

    _, expected = run(cached=False)
    model, losses = run(cached=True, persistent=True)
    assert_trains_the_same(losses, expected)
    assert_each_row_is_computed_once(model)
    torchcache.flush()
    model, losses = run(cached=True, persistent=True)
    assert_trains_the_same(losses, expected)
    assert torchcache.stats(model).misses == 0, "quantized anew, the same weights are found"


def test_torchao_weights_count_by_what_they_hold(pictures):
    config = QUANTIZED[0]
    plain = quantized(config)["backbone"]
    cached = torchcache.mark(quantized(config)["backbone"], audit=0.0)

    def assert_same():
        for _ in range(2):
            torch.testing.assert_close(cached(pictures).pooler_output, plain(pictures).pooler_output)

    assert_same()
    for backbone in (cached, plain):
        backbone.layers[0].mlp.fc1.weight.qdata.neg_()
    assert_same()
    for backbone in (cached, plain):
        backbone.layers[0].mlp.fc1.weight.scale.mul_(0.5)
    assert_same()
    for backbone in (cached, plain):
        backbone.load_state_dict(quantized(config, seed=1)["backbone"].state_dict(), assign=True)
    assert_same()
    assert torchcache.stats(cached).misses == 4 * SAMPLES


@pytest.mark.parametrize("config", QUANTIZED)
def test_torchao_below_a_last_block_that_trains(pictures, config):
    torchao = pytest.importorskip("torchao.quantization")

    def run(cached):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE**2, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 3))
        torchao.quantize_(net[1], getattr(torchao, config)())
        net[:3].requires_grad_(False)
        if cached:
            torchcache.mark(net)
        return net, trained(net, lambda rows: nn.functional.cross_entropy(net(pictures[rows]), LABELS[rows]))

    _, expected = run(cached=False)
    model, losses = run(cached=True)
    assert_trains_the_same(losses, expected)
    assert torchcache.stats(model).hits


def test_torchao_in_place_after_rows_were_stored(pictures):
    torchao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE**2, 32), nn.GELU(), nn.Linear(32, 16))
    net.eval().requires_grad_(False)
    plain = copy.deepcopy(net)
    torchcache.mark(net, audit=0.0)
    assert torch.equal(net(pictures), plain(pictures))
    for one in (net, plain):
        torchao.quantize_(one, torchao.Int8WeightOnlyConfig())
    for _ in range(2):
        assert torch.equal(net(pictures), plain(pictures))
    assert (torchcache.stats(net).misses, torchcache.stats(net).hits) == (2 * SAMPLES, SAMPLES)


def clip(kind, unlocked):
    """A CLIP of open_clip's whose image tower is locked."""
    model_file = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    model = getattr(model_file, kind)(
        embed_dim=16,
        vision_cfg={"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": IMAGE},
        text_cfg={"context_length": LENGTH, "vocab_size": WORDS, "width": 32, "heads": 2, "layers": 2},
        output_dict=True,
    )
    model.lock_image_tower(unlocked_groups=unlocked)
    return model


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("marked", ["visual", "encode_image", "compiled", "unlocked"])
def test_open_clip_text_tower_on_a_locked_image_tower(pictures, captions, kind, marked):
    open_clip = pytest.importorskip("open_clip")

    def run(cached):
        model = clip(kind, unlocked=2 if marked == "unlocked" else 0)
        forward = model
        if cached:
            torchcache.mark(model.encode_image if marked == "encode_image" else model.visual)
            if marked == "unlocked":
                torchcache.transform(model)
            if marked == "compiled":
                forward = torch.compile(model, backend=torchcache.torchcache_backend, options={"inner": "eager"})
        model.train()
        loss = open_clip.ClipLoss()
        return model, trained(model, lambda rows: loss(**forward(pictures[rows], captions[rows])))

    model, losses = run(cached=True)
    assert_trains_the_same(losses, run(cached=False)[1])
    assert_each_row_is_computed_once(model)


def latent_diffusion():
    """An image autoencoder, a text encoder and a denoiser as Stable Diffusion has them."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    images = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, sample_size=IMAGE,
    )  # fmt: skip
    config = transformers.CLIPTextConfig(
        **{**SMALL, "num_hidden_layers": 2}, vocab_size=WORDS, max_position_embeddings=LENGTH, eos_token_id=END
    )
    denoiser = diffusers.UNet2DConditionModel(
        sample_size=IMAGE // 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4,
    )  # fmt: skip
    model = nn.ModuleDict({"images": images, "texts": transformers.CLIPTextModel(config), "denoiser": denoiser})
    model.requires_grad_(False)
    model["denoiser"].requires_grad_(True).train()
    return model


def test_diffusers_denoiser_on_latents_and_texts(pictures, captions):
    """Each epoch draws another sample of the latents' distribution, other noise and other steps of it."""
    diffusers = pytest.importorskip("diffusers")

    def run(cached):
        model = latent_diffusion()
        if cached:
            torchcache.mark(model["images"].encoder, freeze=True)
            torchcache.mark(model["texts"], freeze=True)
        model["images"].eval()
        model["texts"].eval()
        schedule = diffusers.DDPMScheduler(num_train_timesteps=50)

        def loss_of(rows):
            latents = model["images"].encode(pictures[rows]).latent_dist.sample()
            latents = latents * model["images"].config.scaling_factor
            noise = torch.randn_like(latents)
            steps = torch.randint(schedule.config.num_train_timesteps, (len(rows),))
            noisy = schedule.add_noise(latents, noise, steps)
            text = model["texts"](captions[rows], return_dict=False)[0]
            return nn.functional.mse_loss(model["denoiser"](noisy, steps, text, return_dict=False)[0], noise)

        return model, trained(model, loss_of)

    model, losses = run(cached=True)
    assert_trains_the_same(losses, run(cached=False)[1])
    assert_each_row_is_computed_once(model, regions=2)


def test_diffusers_encode_by_what_its_distribution_is_made_of(pictures):
    """``encode`` returns an object of a class of its own, which holds one tensor."""
    distributions = pytest.importorskip("diffusers.models.autoencoders.vae")
    images = latent_diffusion()["images"].eval()
    expected = images.encode(pictures).latent_dist
    encode = torchcache.mark(images.encode, output=lambda found: found.latent_dist.parameters)
    for _ in range(2):
        found = distributions.DiagonalGaussianDistribution(encode(pictures))
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.std, expected.std)
    assert torchcache.stats(images).hits == len(pictures)


VOCABULARY = ["[PAD]", "[UNK]", "a", "the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "fast", "slow"]


@pytest.fixture
def encoder_folder(tmp_path):
    """A tiny BERT with its tokenizer, as a model hub has them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "encoder"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=LENGTH
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, vocab_size=len(words), max_position_embeddings=LENGTH)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("padding", "options"), [("max_length", {}), (True, {}), (True, {"padding": "attention_mask"})]
)
def test_sentence_transformers_layer_on_a_frozen_encoder(encoder_folder, padding, options):
    """Padded to one length each text is one row; padded to its batch's longest it is several, but with ``padding=``."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses_of = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    order = random.Random(0)
    pairs = [[" ".join(order.choices(VOCABULARY[2:], k=order.randint(2, 9))) for _ in range(2)] for _ in range(SAMPLES)]
    scores = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(5))

    def run(cached):
        torch.manual_seed(1)
        encoder = modules.Transformer(encoder_folder, processing_kwargs={"text": {"padding": padding}})
        pooling = modules.Pooling(encoder.get_embedding_dimension(), "mean")
        model = sentence_transformers.SentenceTransformer(
            modules=[encoder, pooling, modules.Dense(pooling.get_embedding_dimension(), 16)], device="cpu"
        )
        if cached:
            torchcache.mark(encoder.auto_model, freeze=True, **options)
        encoder.requires_grad_(False)
        encoder.eval()
        objective = losses_of.CosineSimilarityLoss(model)

        def loss_of(rows):
            texts = [model.preprocess([pairs[row][side] for row in rows.tolist()]) for side in range(2)]
            return objective(texts, scores[rows])

        return model, trained(model, loss_of)

    model, losses = run(cached=True)
    plain, expected = run(cached=False)
    assert_trains_the_same(losses, expected)
    stats = torchcache.stats(model)
    different = len({text for pair in pairs for text in pair})
    assert stats.misses + stats.hits + stats.bypasses == 2 * SAMPLES * EPOCHS
    if options:  # a text that was as long as all before it is known by that length, too
        assert stats.misses + stats.bypasses < 1.5 * different
    else:
        assert stats.bypasses == 0
        assert stats.misses == different if padding == "max_length" else different < stats.misses < 3 * different
    texts = [text for pair in pairs for text in pair]
    assert model.encode(texts) == pytest.approx(plain.encode(texts), abs=1e-5)
