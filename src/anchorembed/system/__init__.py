"""What machine this is, and what every part asks of it.

Read `device` (CPU or GPU, number format, seeds, memory), `files` (written whole, locked, hashed), `processes` (several
as one) and `progress` (the bar).
"""
