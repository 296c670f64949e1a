"""The four reward models of the paper, one file each, and the face networks."""
