"""Devices and processes: mappings over them, agreement between them, how fast they are."""
