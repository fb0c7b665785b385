"""The Threefry-2x32 block cipher as a random function: 64 bits of key and 64 of counter in, 64 random bits out.

The values are those of `jax.random` with its threefry keys. Its own program for CPUs writes the whole state to memory
between rounds, so as to compile faster; written out, the 20 rounds stay in registers, take a quarter of the time for
millions of counters, and fuse with whatever uses the bits.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)


def threefry(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Two words u32 `[..]` for every key and counter, two words u32 each that broadcast together."""
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    first, second = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for bits in ROTATIONS[group % 2]:
            first += second
            second = first ^ (second << np.uint32(bits) | second >> np.uint32(32 - bits))
        first += keys[(group + 1) % 3]
        second += keys[(group + 2) % 3] + np.uint32(group + 1)
    return first, second


def random_bits(seed: jax.Array, positions: jax.Array, places: jax.Array) -> jax.Array:
    """U32 `[B, T, K]`: what `jax.random.bits(jax.random.fold_in(jax.random.key(seed), position), (count,))` has at
    `places` i32 `[K]`, whatever the count, of every seed u32 `[B]` and position i32 `[B, T]`."""
    zero = jnp.zeros((), jnp.uint32)
    first, second = threefry((zero, seed[:, None]), (zero, positions.astype(jnp.uint32)))  # [B, T]
    counters = zero, places.astype(jnp.uint32)
    first, second = threefry((first[..., None], second[..., None]), counters)
    return first ^ second
