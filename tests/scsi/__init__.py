"""Guests around a disk on a storage network: target, server, clients."""
