"""The operations of NFSv4.1 and 4.2. Each module has those of one subject, and a table of them."""
