"""Uniform random numbers by a counter in place of a stream: each is a hash of where it is used."""

import numpy as np

from nanopcf.run.machine import check_room


def counter_uniforms(seed: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """[len(rows), columns] float32 in [0, 1): entry (i, t) is a hash of (seed, rows[i], t), made as in splitmix64.

    Raises ValueError when there is no memory for so many sequences.
    """
    check_room(len(rows), columns)

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        # The seed is mixed before the row is added, so that seeds 1 and 2 share nothing.
        key = mix(np.array([seed % 2**64], dtype=np.uint64) + step)  # (1,)
        row_key = mix(key + step * (rows.astype(np.uint64) + np.uint64(1)))[:, None]  # (rows, 1)
        bits = mix(row_key + step * np.arange(1, columns + 1, dtype=np.uint64))  # (rows, columns)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
