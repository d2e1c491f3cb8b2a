"""Models as files that run without this package: what is exported, how it is written, quantized and run."""
