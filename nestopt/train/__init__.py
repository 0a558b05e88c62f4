"""The wing that trains: its loop, engines, data, checkpoints, plans and reports. Loads when it is used."""
