"""What machine this is, and what all other folders need of it.

Read `device` (CPU or GPU, number format, random state, memory), `files` (written whole, locked, hashed), `processes`
(several that train as one), `keys` (API keys) and `progress` (the progress bar).
"""
