"""What the library costs and what it gives, measured against its references in the same run.

From the repository's root with `tests` on the path: `python -m benchmarks` measures everything and
keeps it in `results/`, `python -m benchmarks.check` measures the ratios alone and holds them
against those.
"""
