-- From version 2 to 3: a message and what is said to it know the trace that they are part of.

-- The trace (W3C traceparent) that a message's turn goes on in, in whichever process; NULL: none.
ALTER TABLE message ADD COLUMN traceparent TEXT;

-- The attempt that said it.
ALTER TABLE delivery ADD COLUMN traceparent TEXT;
