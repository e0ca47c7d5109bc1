"""The runtime: engine, page pool, model, sampling, constrained decoding, reference."""
