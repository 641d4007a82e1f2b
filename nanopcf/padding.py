"""Which sequences are padded to a common length, in the prefill and in the attention of decoding."""

from math import inf


def similar(lengths: list[int], waste: int, most: float = inf) -> list[tuple[int, int]]:
    """Neighbours that share a padded length: [(how many, that length)], all in the order given.

    A group ends before it holds more than `waste` positions of padding, or more than `most` positions (but one length
    of its own may be longer).
    """
    padded = len(lengths) * max(lengths)
    if padded <= most and padded - sum(lengths) <= waste:  # as nearly always
        return [(len(lengths), max(lengths))]
    groups, count, longest, total = [], 0, 0, 0
    for n in lengths:
        padded = (count + 1) * max(longest, n)
        if count and (padded > most or padded - total - n > waste):
            groups.append((count, longest))
            count, longest, total = 0, 0, 0
        count, longest, total = count + 1, max(longest, n), total + n
    return [*groups, (count, longest)]


def in_parts(lengths: list[int], waste: int, most: float) -> list[list[int]]:
    """The places of the lengths, the shortest first, in the groups of `similar`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    parts = []
    for count, _ in similar([lengths[i] for i in order], waste, most):
        parts.append(order[:count])
        order = order[count:]
    return parts
