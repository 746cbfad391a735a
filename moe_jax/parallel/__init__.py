"""Many devices and hosts: shardings, processes, costs and placement, self-test."""
