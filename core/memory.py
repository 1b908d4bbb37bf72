"""The memory bank: a ring of past teacher embeddings for each modality.

MerMED-FM keeps one ring with a modality mask; with balanced batches rings of their own hold the
same entries, cost a seventh of the logits, and cannot leave a block without the modality.
"""

import torch
from torch import Tensor

from core.checkpoint import Arrays
from core.modalities import MODALITIES

NO_PATIENT = -1
"""Patient number of a slot that still holds its random anchor."""


class MemoryBank:
    """Rings of `entries` unit vectors [M, K, D], and whose each entry is [M, K].

    The bank holds patient embeddings: it never leaves the site.
    """

    def __init__(self, entries: int, dim: int, generator: torch.Generator) -> None:
        anchors = torch.randn(len(MODALITIES), entries, dim, generator=generator)
        self.embeddings = torch.nn.functional.normalize(anchors, dim=-1)  # [M, K, D]
        self.patients = torch.full((len(MODALITIES), entries), NO_PATIENT)  # [M, K]
        self.cursor = [0] * len(MODALITIES)

    def to(self, device: torch.device) -> "MemoryBank":
        """Move the embeddings to the device where the loss is computed."""
        self.embeddings = self.embeddings.to(device)
        return self

    def write(self, modality: int, embeddings: Tensor, patients: Tensor) -> None:
        """Overwrite the oldest entries of a modality by embeddings [B, D] of patients [B]."""
        entries = self.embeddings.shape[1]
        embeddings, patients = embeddings[-entries:], patients[-entries:]
        slots = (torch.arange(len(patients)) + self.cursor[modality]) % entries
        self.embeddings[modality, slots.to(self.embeddings.device)] = embeddings.float()
        self.patients[modality, slots] = patients.cpu()
        self.cursor[modality] = int((self.cursor[modality] + len(patients)) % entries)

    def written(self, modality: int) -> tuple[Tensor, Tensor]:
        """Embeddings [n, D] and patients [n] of the slots that hold a real image."""
        held = self.patients[modality] != NO_PATIENT
        return self.embeddings[modality].cpu()[held], self.patients[modality][held]

    def mean(self, modality: int) -> Tensor:
        """Mean [D] of the slots of a modality that hold a real image; zeros while none does."""
        held = (self.patients[modality] != NO_PATIENT).to(self.embeddings.device)
        return self.embeddings[modality][held].sum(0) / held.sum().clamp(min=1)

    def to_arrays(self) -> Arrays:
        """Everything needed to go on, as arrays."""
        return {
            "embeddings": self.embeddings.cpu().numpy(),
            "patients": self.patients.numpy(),
            "cursor": torch.tensor(self.cursor).numpy(),
        }

    def load_arrays(self, arrays: Arrays) -> None:
        """The inverse of `to_arrays`."""
        self.embeddings = torch.from_numpy(arrays["embeddings"]).to(self.embeddings.device)
        self.patients = torch.from_numpy(arrays["patients"])
        self.cursor = [int(position) for position in arrays["cursor"]]
