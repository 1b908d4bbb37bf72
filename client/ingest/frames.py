"""Which frames of a cine, slices of a volume, or pages of a file become pictures."""


def pick_frames(count: int, most: int) -> list[int]:
    """Choose frames evenly: the middle of each of `most` equal parts, or all when there are fewer.

    The ends are left out where there is a choice: the outermost slices of a volume are mostly air.

    Args:
        count: Frames there are.
        most: Frames wanted, at least one.

    Returns:
        Increasing indices below `count`; the same for the same arguments.
    """
    assert most >= 1
    if count <= most:
        return list(range(count))
    return [(2 * part + 1) * count // (2 * most) for part in range(most)]
