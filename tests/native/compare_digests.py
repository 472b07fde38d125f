"""Compares files of digests that sanitize.cc printed: the first with each of the others."""

import pathlib
import sys

# Of calls with bfloat16, float32, float64, by bytes: what rounding does to two products in turn.
TOLERANCES = {"2": 2**-8, "4": 2e-6, "8": 1e-15}


def rows(path):
    return [line.split() for line in pathlib.Path(path).read_text().splitlines()]


def main():
    first, *others = sys.argv[1:]
    for other in others:
        worst = dict.fromkeys(TOLERANCES, 0.0)
        for (what, size, a, scale), (its, other_size, b, _) in zip(
            rows(first), rows(other), strict=True
        ):
            assert (what, size) == (its, other_size)
            difference = abs(float(a) - float(b)) / max(float(scale), 1e-30)
            assert difference <= TOLERANCES[size], f"{other}: {what} differs by {difference}"
            worst[size] = max(worst[size], difference)
        shown = ", ".join(f"{size} bytes {value:.1e}" for size, value in worst.items())
        print(f"{pathlib.Path(other).stem}: {len(rows(other))} results alike; {shown}")


if __name__ == "__main__":
    main()
