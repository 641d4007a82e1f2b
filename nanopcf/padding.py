"""Which sequences are padded to a common length, in the prefill and in the attention of decoding."""

from math import inf


def similar(lengths: list[int], waste: int, most: float = inf) -> list[tuple[int, int]]:
    """Neighbours that share a padded length: [(how many, that length)], all in the order given.

    A group ends before it holds more than `waste` positions of padding, or more than `most` positions (but one length
    of its own may be longer).
    """
    groups, count, longest, total = [], 0, 0, 0
    for n in lengths:
        padded = (count + 1) * max(longest, n)
        if count and (padded > most or padded - total - n > waste):
            groups.append((count, longest))
            count, longest, total = 0, 0, 0
        count, longest, total = count + 1, max(longest, n), total + n
    return [*groups, (count, longest)]
