"""The proxies that are compared: one file each, or one for those that are installed alike."""
