"""Virtual machines with a Linux kernel client: the rig, and the tests that run in them."""
