"""Trees, coupled sampling, acceptance and the decode loop. Knows no model family and no drafting method."""
