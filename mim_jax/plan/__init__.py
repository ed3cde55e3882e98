"""Planning of a run on devices that are not there: memory, time and communication of its step."""
