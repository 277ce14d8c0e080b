"""The small models that the harness runs: each has a backbone to mark and a head to train."""

import dataclasses
import types

import structures
import torch
from torch import nn

import torchcache

POOL = 8
WIDTH = 8
SETTINGS = {"gain": 1.0}
OFFSET = 0.0


def unturned(y):
    return y


def turned(y):
    return y.flip(-1)


def negated(y):
    return -2 * y


TURNS = (unturned, turned, negated)


def _raising(amount):
    def raised(y):
        return y + amount

    return raised


RAISE = _raising(0.0)


def doubled_input(module, args):
    return (args[0] * 2, *args[1:])


def lowered(module, args, output):
    return output - 3.0


def squared(module, x):
    return type(module).forward(module, x).square()


def world():
    """What is global here and changes while programs run."""
    return dict(SETTINGS), OFFSET, RAISE.__closure__[0].cell_contents, TURNS.index(Net.turn)


def set_world(known):
    """Make it what it was."""
    global OFFSET
    settings, OFFSET, amount, turn = known
    SETTINGS.update(settings)
    RAISE.__closure__[0].cell_contents = amount
    Net.turn = staticmethod(TURNS[turn])


@dataclasses.dataclass
class Config:
    shift: float = 0.0


class Block(nn.Module):
    """A part that may be marked on its own."""

    def __init__(self, width=WIDTH, dropout=0.1):
        super().__init__()
        self.linear = nn.Linear(width, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.slope = 1.0

    def forward(self, x):
        return self.dropout(nn.functional.gelu(self.norm(self.linear(x)))) * self.slope + x[..., :WIDTH]


class Net(nn.Module):
    """A ``body`` of rows, a ``last`` layer, and numbers from an attribute, a config, globals and the call."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.last = nn.Linear(WIDTH, WIDTH)
        self.gain = 1.0
        self.asks = False
        self.config = Config()

    BATCH_DIM = 0
    OPTIONS = types.MappingProxyType({})
    turn = staticmethod(unturned)

    @staticmethod
    def arranged(*batch):
        """The arguments of a call, from tensors with rows first."""
        return batch

    def cast(self, x):
        return x.to(self.last.weight.dtype)

    def finish(self, y, scale, flip):
        if flip is None:  # rows depend on each other
            return y - y.mean(0)
        if self.asks and torch.compiler.is_compiling():
            y = y + 1
        y = RAISE(self.turn(self.last(y))) * (self.gain * SETTINGS["gain"] * scale) + (self.config.shift + OFFSET)
        return -y if flip else y

    def forward(self, x, scale=1.0, flip=False):
        return self.finish(self.body(self.cast(x)), scale, flip)


class Mlp(Net):
    def __init__(self, block, dropout):
        super().__init__(nn.Sequential(block(12, dropout), nn.Linear(WIDTH, WIDTH)))

    @staticmethod
    def pool(generator):
        return (torch.randn(POOL, 1, 12, generator=generator),)

    @staticmethod
    def reshaped(x):
        return (x.reshape(len(x), 12),)


class Containers(Net):
    def __init__(self, block, dropout):
        parts = {"stem": block(12, dropout), "blocks": nn.ModuleList(block(WIDTH, dropout) for _ in range(2))}
        super().__init__(nn.ModuleDict(parts))

    def forward(self, x, scale=1.0, flip=False):
        y = self.body["stem"](self.cast(x))
        for index in (0, 1, 0):
            y = self.body["blocks"][index](y)
        return {"features": self.finish(y, scale, flip), "all": [y, {"sum": y.sum(-1)}]}

    pool, reshaped = Mlp.pool, Mlp.reshaped


class Branches(Net):
    """Layers of one shape, of which a call takes some: frozen parts that differ in weights alone."""

    def __init__(self, block, dropout):
        super().__init__(nn.ModuleList(nn.Linear(4, WIDTH) for _ in range(3)))

    def forward(self, x, scale=1.0, flip=False):
        first, second = self.body[1:] if flip else self.body[:-1]
        y = torch.tanh(first(self.cast(x)[..., :4])) + second(self.cast(x)[..., 4:8])
        return self.finish(y, scale, flip)

    pool, reshaped = Mlp.pool, Mlp.reshaped


class Cnn(Net):
    def __init__(self, block, dropout):
        layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, WIDTH, 3, padding=1)]
        super().__init__(nn.Sequential(*layers, nn.BatchNorm2d(WIDTH), nn.AdaptiveMaxPool2d(1), nn.Flatten()))

    @staticmethod
    def pool(generator):
        return (torch.randn(POOL, 2, 4, 6, generator=generator),)

    @staticmethod
    def reshaped(x):
        return (x.reshape(len(x), 2, 6, 4),)


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x, hidden):
        y, _ = self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)
        return self.layer(x + y)


class Attention(Net):
    def __init__(self, block, dropout):
        super().__init__(Attend())

    def forward(self, x, hidden, scale=1.0, flip=False):
        return self.finish(self.body(self.cast(x), hidden), scale, flip)

    @staticmethod
    def pool(generator):
        hidden = torch.rand(POOL, 4, generator=generator) < 0.4
        hidden[:, 0] = False
        return torch.randn(POOL, 4, WIDTH, generator=generator), hidden

    @staticmethod
    def reshaped(x, hidden):
        return x[:, :2].clone(), hidden[:, :2].clone()


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(400, WIDTH, padding_idx=0)  # not compared whole in every call
        self.kinds = nn.Embedding(3, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, words, kinds):
        return self.norm(self.words(words) + self.kinds(kinds)).flatten(1).unflatten(1, (-1, WIDTH))


class Tokens(Net):
    def __init__(self, block, dropout):
        super().__init__(Embed())

    def forward(self, words, kinds, scale=1.0, flip=False):
        return self.finish(self.body(words, kinds), scale, flip)

    @staticmethod
    def pool(generator):
        sizes = (POOL, 6)
        return torch.randint(1, 11, sizes, generator=generator), torch.randint(0, 3, sizes, generator=generator)

    @staticmethod
    def reshaped(words, kinds):
        return words.int(), kinds.int()


class Scan(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(6, WIDTH, batch_first=True)

    def forward(self, x):
        y, state = self.cells(x)
        return y[:, -1] + (state[0] if isinstance(state, tuple) else state)[0]


class Recurrent(Net):
    KIND = nn.GRU

    def __init__(self, block, dropout):
        super().__init__(Scan(self.KIND))

    @staticmethod
    def pool(generator):
        return (torch.randn(POOL, 4, 6, generator=generator),)

    @staticmethod
    def reshaped(x):
        return (x[:, :2].clone(),)


class Memory(Recurrent):
    KIND = nn.LSTM


class Sequence(Recurrent):
    """Takes and gives the rows along the second dimension."""

    BATCH_DIM = 1

    def __init__(self, block, dropout):
        super().__init__(block, dropout)
        self.body = nn.GRU(6, WIDTH)

    def forward(self, x, scale=1.0, flip=False):
        return self.finish(self.body(self.cast(x))[0], scale, flip)

    @staticmethod
    def arranged(x):
        return (x.movedim(0, 1).contiguous(),)


class Several(Net):
    """Several inputs, one of which all rows share, and nested outputs."""

    def __init__(self, block, dropout):
        super().__init__(block(12, dropout))

    def forward(self, x, ids, table, scale=1.0, flip=False):
        y = self.finish(self.body(self.cast(x)), scale, flip)
        picked = table[ids]
        turned = (y.unsqueeze(-1) + torch.tensor([0.0, 1.0]).to(y)).mT  # does not lie in memory as its shape says
        parts = (y[..., 0] * 2 + picked, [ids > 2, None], turned)
        return {"features": y, "parts": parts, "ids": ids, "name": "several"}

    @staticmethod
    def pool(generator):
        ids = torch.randint(0, 5, (POOL,), generator=generator)
        return torch.randn(POOL, 12, generator=generator), ids, torch.randn(5, generator=generator)

    @staticmethod
    def reshaped(x, ids, table):
        return x, ids, table * 3 + 1


class Shaped(Net):
    """Takes tensors in any structure, with constants that count, and answers in the structure that is asked for."""

    def __init__(self, block, dropout):
        super().__init__(block(12, dropout))

    def forward(self, given, answer=("tensor", 0), scale=1.0, flip=False):
        leaves = list(structures.leaves_of(given))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        x = next(leaf for leaf in tensors if leaf.ndim > 1)
        others = [leaf.to(self.last.weight.dtype) for leaf in tensors if leaf.ndim == 1]
        wide = leaves[0] is x or len(others) < 2
        y = self.body(self.cast(x)) + (others[0] if wide else 2 * others[1]).unsqueeze(-1)
        constants = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        y = y + structures.weigh([*structures.names_of(given), *constants]) / 10
        y = self.finish(y, scale, flip)
        return structures.build(answer, [y, y[:, 0] > 0, y.sum(-1)], x.shape)

    @staticmethod
    def pool(generator):
        x = torch.randn(POOL, 12, generator=generator)
        return x, torch.randn(POOL, generator=generator), torch.randint(0, 5, (POOL,), generator=generator)

    @staticmethod
    def reshaped(x, shift, ids):
        return torch.cat((x, x), -1)[:, :12] * 2, shift, ids.int()


class Listed(Net):
    """Takes its rows as one tensor or as a list of tensors, one a row."""

    def __init__(self, block, dropout):
        super().__init__(block(12, dropout))

    def forward(self, rows, scale=1.0, flip=False):
        rows = torch.stack(list(rows)) if isinstance(rows, (list, tuple)) else rows
        return self.finish(self.body(self.cast(rows)), scale, flip)

    pool, reshaped = Mlp.pool, Mlp.reshaped


class Padded(Net):
    """Takes sequences that are padded to the longest of their batch; what it gives for padding is zero."""

    OPTIONS = types.MappingProxyType({"padding": "mask"})

    def __init__(self, block, dropout):
        super().__init__(block(12, dropout))

    def forward(self, x, mask, scale=1.0, flip=False):
        real = mask.unsqueeze(-1).to(self.last.weight.dtype)
        y = self.body(self.cast(x)) * real
        y = y + y.sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return self.finish(y, scale, flip) * real

    @staticmethod
    def pool(generator):
        mask = torch.arange(21) < torch.tensor([1, 20, 3, 9, 21, 8, 17, 9])[:, None]
        return torch.randn(POOL, 21, 12, generator=generator) * mask.unsqueeze(-1), mask

    @staticmethod
    def arranged(x, mask):
        longest = int(mask.sum(1).max()) if len(mask) else 1
        return x[:, :longest].clone(), mask[:, :longest].clone()

    @staticmethod
    def reshaped(x, mask):
        return x[:, :10].clone(), mask[:, :10].clone()


_NETS = (
    Mlp,
    Containers,
    Branches,
    Cnn,
    Attention,
    Tokens,
    Recurrent,
    Memory,
    Sequence,
    Several,
    Shaped,
    Listed,
    Padded,
)
KINDS = {kind.__name__: kind for kind in _NETS}


def _marked(kind):
    """A marked subclass, under a name by which pickles find it."""
    found = type(f"Marked{kind.__name__}", (kind,), {"__module__": __name__})
    globals()[found.__name__] = torchcache.torchcache(found)
    return found


def _kept(kind):
    """A subclass that returns what ``kept`` makes of its output, under a name by which pickles find it."""

    def forward(self, *args, **kwargs):
        return kept(kind.forward(self, *args, **kwargs))

    found = type(f"Kept{kind.__name__}", (kind,), {"__module__": __name__, "forward": forward})
    globals()[found.__name__] = found
    return found


def kept(found):
    """Another value of what the head takes, and nothing else."""
    if isinstance(found, torch.Tensor):
        return found * 2 - 1
    if isinstance(found, dict) and "features" in found:
        return {"features": found["features"] * 3}
    return [features_of(found) * 0.5]


KEPT = {name: _kept(kind) for name, kind in KINDS.items()}
MARKED = {name: _marked(kind) for name, kind in KINDS.items()}
MarkedBlock = _marked(Block)


class Model(nn.Module):
    """A backbone and a head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, *inputs, **arguments):
        found = self.backbone(*inputs, **arguments)
        features = found["features"] if isinstance(found, dict) and "features" in found else features_of(found)
        return found, self.head(features.to(self.head.weight.dtype))


def features_of(found):
    """The tensor in an output that the head takes."""
    tensors = structures.tensors_of(found)
    return next(leaf for leaf in tensors if leaf.ndim > 1 and leaf.shape[-1] == WIDTH and leaf.is_floating_point())
