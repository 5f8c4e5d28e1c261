"""What Matcha-TTS's own decoder says, for weights and inputs drawn by numpy's frozen generator.

In an environment apart, with torch; it writes recorded.safetensors beside this file:

    pip install --no-deps matcha-tts einops diffusers conformer
    python tests/matcha/official.py

Only the answers are stored. Weights and inputs are drawn again by whoever compares
(tests/test_decoder.py, nbs/engine/14_matcha.ipynb).
"""

import json
from importlib.metadata import version
from pathlib import Path
import numpy as np
import torch

FILE = Path(__file__).with_name("recorded.safetensors")
SIZES = dict(
    paper=dict(
        channels=(256, 256),
        n_blocks=1,
        num_mid_blocks=2,
        num_heads=2,
        attention_head_dim=64,
        speaker=0,
        length=40,
    ),
    deep=dict(
        channels=(16, 24, 32),
        n_blocks=2,
        num_mid_blocks=1,
        num_heads=3,
        attention_head_dim=8,
        speaker=12,
        length=24,
    ),
)


def weights(shapes: dict, seed: int = 0) -> dict:
    "A state dict of plausible size, drawn name after name."
    draw, state = np.random.RandomState(seed), {}
    for name, shape in sorted(shapes.items()):
        w = draw.standard_normal(shape)
        if len(shape) > 1:
            w /= np.sqrt(np.prod(shape[1:]))
        else:
            w = 0.1 * w + name.endswith(("norm1.weight", "norm3.weight", "block.1.weight"))
        state[name] = torch.tensor(w, dtype=torch.float32)
    return state


def inputs(size: dict, seed: int = 1) -> tuple:
    "x_t, t, μ, mask and speaker (or None) of two items, the second one padded."
    draw, L = np.random.RandomState(seed), size["length"]
    xt, mu, t, who = [
        torch.tensor(draw.standard_normal(s), dtype=torch.float32)
        for s in ((2, 80, L), (2, 80, L), (2,), (2, max(1, size["speaker"])))
    ]
    mask = torch.ones(2, 1, L)
    mask[1, :, 2 * L // 3 :] = 0
    return xt, t.sigmoid(), mu, mask, who if size["speaker"] else None


def official(speaker: int = 0, length: int = 0, **size):
    "Matcha's decoder of a size."
    from matcha.models.components.decoder import Decoder

    return Decoder(160 + speaker, 80, dropout=0.05, act_fn="snakebeta", **size).eval()


if __name__ == "__main__":
    from safetensors.torch import save_file

    answers, shapes = {}, {}
    for name, size in SIZES.items():
        model = official(**size)
        shapes[name] = {k: list(w.shape) for k, w in model.state_dict().items()}
        model.load_state_dict(weights(shapes[name]))
        xt, t, mu, mask, who = inputs(size)
        with torch.no_grad():
            answers[name] = model(xt, mask, mu, t, spks=who).contiguous()
        print(name, sum(p.numel() for p in model.parameters()), answers[name].std().item())
    save_file(
        answers,
        FILE,
        dict(
            shapes=json.dumps(shapes),
            versions=json.dumps(
                {p: version(p) for p in ("torch", "diffusers", "numpy")} | {"matcha-tts": "0.0.7.2"}
            ),
        ),
    )
