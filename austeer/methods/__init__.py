"""Every steering method: one file each, found here by the registry."""
