"""Target families, one file each, under the contract in `contract.py`."""
