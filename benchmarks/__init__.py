"""What the library costs and gives, measured on real servers: `python -m benchmarks --help`."""
