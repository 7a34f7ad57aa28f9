"""Steps captured as CUDA graphs: static shapes, buffers that stay, replays that were checked."""
