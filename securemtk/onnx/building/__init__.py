"""What rules are built with, from one node of a file to the steps of a program.

registry    a rule, a step, a refusal, and the questions that every rule asks of a node
lower       the last change of a step: functions of one variable become pieces of polynomials
builder     several steps of one node, one by one
operands    formulas over inputs that broadcast, constants among them
windows     sliding windows of convolutions and pools
lookups     tables that a secret place is looked up in
integers    what must stay whole because onnxruntime computes it in integers
proofs      what is known of the values of a node: their bounds, and that they are even over an axis
scales      how many digits a constant keeps
"""
