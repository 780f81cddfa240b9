"""Kits: the settings of a sampler and the networks that they name, in one folder to share."""
