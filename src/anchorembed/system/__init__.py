"""The machine, as all other folders use it.

Read `device` (CPU or GPU, number format, random state, memory), `files` (written whole, locked, hashed), `processes`
(multi-process training), `keys` (API keys) and `progress` (the progress bar).
"""
