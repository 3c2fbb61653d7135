"""The passes: a traced graph and a spec become a program of segments, sites and zones.  See kvcompile/pipeline.py for their order."""
