"""AdamW in groups of layer and decay, its moments as arrays, and the clipping of gradients."""

from collections.abc import Sequence

import torch

from core.backbone import Network
from core.checkpoint import Arrays
from core.config import Recipe


def make_optimizer(student: Network, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in groups of one decay and layer scale; `lr_scale` and `decays` steer `set_rates`."""
    depth = len(student.backbone.blocks)  # type: ignore[arg-type]
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        layer = depth + 1
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("backbone.patch_embed", "backbone.cls_token", "backbone.pos_embed")):
            layer = 0
        decays = parameter.ndim >= 2 and not name.endswith(("cls_token", "pos_embed", "reg_token"))
        scale = recipe.optim.layer_decay ** (depth + 1 - layer)
        groups.setdefault((scale, decays), []).append(parameter)
    table = [{"params": p, "lr_scale": s, "decays": d} for (s, d), p in groups.items()]
    return torch.optim.AdamW(table, lr=0.0, weight_decay=0.0, fused=True)


def moment_arrays(optimizer: torch.optim.Optimizer, network: Network) -> Arrays:
    """What AdamW knows of each weight, by kind and the weight's name; nothing before a step."""
    return {
        f"optimizer/{moment}/{name}": value.cpu().numpy()
        for name, parameter in network.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(optimizer: torch.optim.Optimizer, network: Network, arrays: Arrays) -> None:
    """The inverse of `moment_arrays`; without arrays nothing changes."""
    for name, parameter in network.named_parameters():
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            if (array := arrays.get(f"optimizer/{moment}/{name}")) is not None:
                moments = optimizer.state[parameter]
                moments[moment] = torch.from_numpy(array.copy()).to(parameter.device)


def clip_each(parameters: Sequence[torch.nn.Parameter], limit: float) -> None:
    """Scale each tensor's gradient to at most `limit`, as MerMED-FM does, not all together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    torch._foreach_mul_(gradients, [limit / norm.clamp(min=limit) for norm in norms])
