"""The laboratory: studies, reports, preference tests, kits and judges. The library needs none."""
