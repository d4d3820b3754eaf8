"""A small, real trainer of EDM2 networks, written on the public names of `posthoc_ema` only.

It is a model of use (how one's own loop tracks averages, takes snapshots and resumes exactly) and the
source of the runs that this project measures. Start at `reference_trainer.presets` and
`reference_trainer.loop.train`. Nothing is imported here, so that reading a preset loads no torch.
"""
