"""What the library costs and what it gives, measured against its references in the same run.

`python -m benchmarks`, from the repository's root with `tests` on the path.
"""
