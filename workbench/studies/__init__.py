"""Studies: every mechanism under every compression, from probes and toggles that know nothing of each other.

result = CrossStudy().run(subject); result.plot("matrix"); result.plot("frontier")
"""
