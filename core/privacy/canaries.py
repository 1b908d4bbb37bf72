"""Canaries: patients whose gradient is as easy to see as can be, for an audit of private training.

A canary's pictures have one colour, and the colour is its number. The network has a weight a canary
in each of four tensors and looks at the colour alone, so that the gradient of a canary lies on its
own weights, far longer than the clip. All that is audited lies between: patients and their images,
views, teacher, loss, gradients by patient, clip, sum, noise, step, as in core.private_round.
"""

import random as python_random
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from core.backbone import Network
from core.config import EvaluationConfig, LossConfig, Recipe, ViewsConfig
from core.memory import MemoryBank
from core.modalities import MEAN_STD, MODALITIES
from core.privacy.audit import AS_SENT, REPLAYED, Flags, Floats, Verdict, judge
from core.privacy.config import PrivacyConfig
from core.privacy.noise import PrivateRandom
from core.privacy.sampling import Patients, draw_patients
from core.privacy.step import PrivateOptimizer
from core.privacy.unit import Comparison, PublicMemory
from core.private_round import add_patients
from core.randomness import torch_generator
from core.shards import Shard
from core.step import TrainState

TENSORS: Final = 4
"""Over which a canary's gradient is spread: a clip of each tensor alone would let through twice as
much."""
STRENGTH: Final = 1000.0
"""Length of a canary's gradient in clips, about."""
RATE: Final = 1e-9
"""Of descent: so small that all steps have the same gradients; scores are divided by it."""
MODALITY: Final = "ct"
PX: Final = 8
VIEWS: Final = ViewsConfig(
    global_px=PX, local_px=PX, local_views=4, global_area=(1, 1), local_area=(1, 1),
    rotation_degrees=0, flip_probability=0, jitter_probability=0, blur_probability=(0, 0, 0),
)  # fmt: skip
"""Each view has the picture's colour."""
IMAGES: Final = 2
"""Of a patient."""
DIM: Final = 4


class CanaryNetwork(nn.Module):
    """Maps a picture to an embedding that leans by the weights which the picture's colour names.

    Args:
        canaries: weights in each tensor.
        strength: how far a weight of 1 leans.
        lean: of all pictures.
    """

    def __init__(self, canaries: int, strength: float, lean: float) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(canaries)) for _ in range(TENSORS))
        self.strength, self.lean = strength, lean

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Unit embeddings [B, D] of views [B, 3, H, W]."""
        number = _number(images_BCHW)  # [B], count of canaries: a blank picture
        count = len(self.weights[0])
        own = sum(weight[number.clamp(max=count - 1)] for weight in self.weights)
        lean = self.lean + self.strength * own * (number < count)
        plain = torch.zeros_like(lean)
        return nn.functional.normalize(torch.stack([plain + 1, lean, plain, plain], dim=-1), dim=-1)


def audit(privacy: PrivacyConfig, *, canaries: int, steps: int, device: str = "cpu") -> Verdict:
    """Train privately on canaries, once and a second time from the same seeds, and attack.

    Images, views, loss, gradients, clip, sum, noise and step are the code that a round runs. What
    couples patients cannot be seen, since a canary's gradient depends on no other patient; nor can
    the divisor, which stretches what is sent as a whole.

    Args:
        privacy: noise, clip and way of the gradients that are audited. Patients are not sampled
            here: every canary is in every step.
        canaries: how many; half of them are in.
        steps: how many.
        device: a torch device name.
    """
    tosses = PrivateRandom().uniform(canaries) < 0.5
    sent = train_on_canaries(privacy, tosses, steps=steps, device=device)
    again = train_on_canaries(privacy, np.zeros_like(tosses), steps=steps, device=device)
    views = {AS_SENT: sent, REPLAYED: sent - again}
    return judge(tosses, views, claimed_gap=steps**0.5 / privacy.noise_multiplier)


def train_on_canaries(privacy: PrivacyConfig, member: Flags, *, steps: int, device: str) -> Floats:
    """Scores [m] of canaries after private training on those that are in.

    Who is left out stays as a patient with blank pictures, whose gradient is 0: so that runs with
    other members draw the same random numbers, if those can be drawn again.

    Every generator that takes a seed is given the same one first.
    """
    _seed_everything()
    count, target = len(member), torch.device(device)
    recipe = Recipe(
        views=VIEWS,
        loss=LossConfig(koleo_weight=0),
        evaluation=EvaluationConfig(every_rounds=0),
        privacy=PrivacyConfig(
            mode="record",
            noise_multiplier=privacy.noise_multiplier,
            clip_norm=privacy.clip_norm,
            expected_patients=privacy.expected_patients,
            gradients=privacy.gradients,
            chunk=privacy.chunk,
            sampling_rate=1.0,
            images_per_patient=IMAGES,
        ),
    )
    student = CanaryNetwork(count, STRENGTH * privacy.clip_norm, lean=0.0).to(target)
    teacher = CanaryNetwork(count, 0.0, lean=1.0).to(target)
    state = TrainState(
        cast(Network, student), cast(Network, teacher), torch.optim.AdamW(student.parameters()),
        MemoryBank(1, DIM, torch_generator("canaries")), target,
    )  # fmt: skip
    random = PrivateRandom()
    optimizer = PrivateOptimizer(
        torch.optim.SGD(student.parameters(), lr=RATE),
        dict(student.named_parameters()),
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        expected_patients=privacy.expected_patients,
        random=random,
    )
    patients = Patients([_shard(member)])
    axis = torch.eye(DIM, device=target)[1]
    memory = PublicMemory(torch.stack([axis, -axis]), None)
    compared = {MODALITIES.index(MODALITY): Comparison(memory, [torch.arange(2)], 0.1, 0.04)}
    for _ in range(steps):
        drawn = draw_patients(patients, 1.0, IMAGES, random)
        add_patients(recipe, state, optimizer, patients, drawn, compared, random)
        optimizer.step()
    moved = torch.stack(list(student.weights)).detach().double().cpu().numpy()  # [TENSORS, m]
    scores: Floats = moved.sum(0) * privacy.expected_patients / RATE
    return scores


def _shard(member: Flags) -> Shard:
    """Each canary a patient with two pictures: its own if it is in, else blank ones."""
    count = len(member)
    number = np.where(member, np.arange(count), count)
    colour = np.stack([number % 256, number // 256 % 256, number // 65_536], axis=1)  # [m, 3]
    pictures = np.broadcast_to(colour[:, None, None].astype(np.uint8), (count, PX, PX, 3))
    total = IMAGES * count
    return Shard(
        name="canaries",
        images=np.repeat(pictures, IMAGES, axis=0),
        modality=np.full(total, MODALITIES.index(MODALITY), dtype=np.int16),
        patient=np.repeat(np.arange(count), IMAGES),
        label=np.full(total, -1),
        split=np.full(total, "train"),
        classes={MODALITY: ()},
    )


def _number(images_BCHW: Tensor) -> Tensor:
    """The number that a picture's colour is [B]; the inverse of `normalise` at its middle."""
    mean, std = (images_BCHW.new_tensor(values) for values in MEAN_STD[MODALITY])
    middle = images_BCHW[..., PX // 2, PX // 2]  # [B, 3]
    digits = ((middle * std + mean) * 255).round().long()
    return digits[..., 0] + 256 * digits[..., 1] + 65_536 * digits[..., 2]


def _seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (the one that a mistake would draw from)
    python_random.seed(0)
