"""The few sizes that arrays are padded to, so that any length, number and size of image shares a compiled program."""


def bucket(size: int) -> int:
    """The next size of the series 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, ..: two steps to a power of two below
    256, four from there on, so that at most a fifth of a long padded array is padding."""
    power = max(64, 1 << ((size - 1).bit_length() - 1)) if size > 1 else 64
    step = power // (2 if power < 256 else 4)
    return max(64, -(-size // step) * step)


def bucket_below(size: int) -> int:
    """The largest number of the series 2, 3, 4, 6, 8, 12, 16, .. that is not above `size` (0 below 2)."""
    power = 1 << (size.bit_length() - 1) if size > 1 else 0
    return power * 3 // 2 if power * 3 // 2 <= size else power


def round_up(size: int) -> int:
    """The next number of the series 1, 2, 3, 4, 6, 8, 12, 16, .."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= size else power


def power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def coarse_bucket(size: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, 512, 1024, 2048, ..: two steps to a power of two up to 512, then one.
    Sizes of chunks and of caches, where one more size costs one more program each."""
    return max(64, round_up(size) if size <= 512 else power_of_two(size))


def chunk_size(size: int, limit: int, alone: bool) -> int:
    """What a chunk of `size` tokens is padded to: `coarse_bucket(size)` if it is read `alone`, up to `limit` tokens;
    `limit`, its half or an eighth where a prompt takes several chunks. An image that must be read whole may be
    longer."""
    if size > limit:
        return coarse_bucket(size)
    if alone:
        return min(coarse_bucket(size), limit)
    return next(part for part in (limit // 8, limit // 2, limit) if size <= part)


def images_bucket(count: int) -> int:
    """The next of 4, 16, 64, ..: how many images a row of a batch may have."""
    return 4 if count <= 4 else 4 * images_bucket(-(-count // 4))


def table_bucket(size: int) -> int:
    """The next of 256, 1024, 4096, ..: features in a table of images."""
    return 64 * images_bucket(-(-size // 64))
