"""The machines and the storage: Ray, launching, folders and buckets, checkpoints, health.

Nothing here knows of images, losses or searches.
"""
