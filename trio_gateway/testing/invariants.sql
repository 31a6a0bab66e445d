-- What must be true of a store at every instant. Each query has a sentence, and returns the rows
-- that break it. Queries are parted by an empty line.

-- a session has at most one open turn (promise 2)
SELECT session, count(*) FROM turn WHERE state IN ('RUNNING', 'RESUME_PENDING')
GROUP BY session HAVING count(*) > 1;

-- a turn's state is one of the table's
SELECT id, state FROM turn
WHERE state NOT IN ('RUNNING', 'RESUME_PENDING', 'COMPLETED', 'FAILED', 'STOPPED', 'QUARANTINED',
                    'EXPIRED');

-- a message is queued, running, or at one of the five ends (promise 1)
SELECT id, state FROM message
WHERE state NOT IN ('queued', 'running', 'answered', 'failed', 'stopped', 'quarantined', 'expired');

-- a running message belongs to an open turn of its session
SELECT message.id, message.turn FROM message LEFT JOIN turn
  ON turn.id = message.turn AND turn.session = message.session
  AND turn.state IN ('RUNNING', 'RESUME_PENDING')
WHERE message.state = 'running' AND turn.id IS NULL;

-- an open turn has a message to answer
SELECT id FROM turn WHERE state IN ('RUNNING', 'RESUME_PENDING')
  AND NOT EXISTS (SELECT 1 FROM message WHERE message.turn = turn.id AND message.state = 'running');

-- a message has a time of its end exactly when it has ended
SELECT id, state FROM message WHERE (state IN ('queued', 'running')) = (ended_at IS NOT NULL);

-- a turn has a time of its end exactly when it is settled (promise 6)
SELECT id, state FROM turn
WHERE (state IN ('RUNNING', 'RESUME_PENDING')) = (settled_at IS NOT NULL);

-- a message ends as its turn does, or is stopped when it waits to be tried again (promise 6)
SELECT message.id, message.state, turn.state FROM message JOIN turn ON turn.id = message.turn
WHERE message.state NOT IN ('queued', 'running')
  AND message.error IS NOT 'dropped from quarantine'
  AND NOT (message.state = 'stopped' AND (message.ended_at != turn.settled_at
    OR EXISTS (SELECT 1 FROM message retry WHERE retry.session = message.session
      AND retry.seq > message.seq AND retry.turn IS NULL AND retry.body LIKE '%"/retry"%')))
  AND message.state != CASE turn.state
    WHEN 'COMPLETED' THEN 'answered' WHEN 'FAILED' THEN 'failed' WHEN 'STOPPED' THEN 'stopped'
    WHEN 'QUARANTINED' THEN 'quarantined' WHEN 'EXPIRED' THEN 'expired' ELSE 'still open' END;

-- a waiting message belongs to no turn, or to an earlier one that ended without an answer
SELECT message.id, turn.id, turn.state FROM message JOIN turn ON turn.id = message.turn
WHERE message.state = 'queued' AND turn.state IN ('RUNNING', 'RESUME_PENDING', 'COMPLETED');

-- a turn has a reason exactly while it is RESUME_PENDING (I5)
SELECT id, state, reason FROM turn WHERE (state = 'RESUME_PENDING') != (reason IS NOT NULL);

-- a marked turn says when it was marked, by two clocks
SELECT id FROM turn
WHERE state = 'RESUME_PENDING' AND (marked_at IS NULL OR marked_up IS NULL);

-- every attempt before the newest is on record, once (I1)
SELECT turn.id, turn.attempt, count(attempt.attempt) FROM turn
LEFT JOIN attempt ON attempt.turn = turn.id
GROUP BY turn.id
HAVING count(attempt.attempt) != turn.attempt - 1
    OR coalesce(max(attempt.attempt), 0) != turn.attempt - 1;

-- a running turn was charged once for each attempt that a crash cut (I2)
SELECT id, crashes FROM turn WHERE state = 'RUNNING' AND crashes !=
  (SELECT count(*) FROM attempt WHERE attempt.turn = turn.id AND attempt.reason = 'crash');

-- a marked turn was charged for this mark too, if it was a crash (I2)
SELECT id, crashes FROM turn WHERE state = 'RESUME_PENDING' AND crashes != (reason = 'crash') +
  (SELECT count(*) FROM attempt WHERE attempt.turn = turn.id AND attempt.reason = 'crash');

-- a planned stop is counted once at the most for each attempt that it cut (I3)
SELECT id, interruptions, crashes, attempt FROM turn WHERE interruptions + crashes > attempt;

-- a turn belongs to an epoch, a session and a conversation that exist
SELECT turn.id FROM turn
LEFT JOIN epoch ON epoch.id = turn.epoch
LEFT JOIN session ON session.id = turn.session AND turn.conversation <= session.conversation
WHERE epoch.id IS NULL OR session.id IS NULL;

-- no two deliveries share a key
SELECT key, count(*) FROM delivery GROUP BY key HAVING count(*) > 1;

-- a turn settles with one reply at the most
SELECT turn, count(*) FROM delivery WHERE final AND turn IS NOT NULL
GROUP BY turn HAVING count(*) > 1;

-- a final reply belongs to a turn that has settled (promise 6)
SELECT delivery.key, turn.state FROM delivery JOIN turn ON turn.id = delivery.turn
WHERE delivery.final AND turn.state IN ('RUNNING', 'RESUME_PENDING');

-- a completed turn settles with an answer, any other with an apology
SELECT delivery.key, delivery.kind, turn.state FROM delivery JOIN turn ON turn.id = delivery.turn
WHERE delivery.final AND (delivery.kind = 'answer') != (turn.state = 'COMPLETED');

-- a reply in parts has all its parts
SELECT turn, n, attempt, kind, parts, count(*) FROM delivery WHERE turn IS NOT NULL
GROUP BY turn, n, attempt, kind HAVING count(*) != parts;

-- a delivery is in a known state, with a time exactly when it has arrived
SELECT key, state FROM delivery
WHERE state NOT IN ('pending', 'sending', 'delivered', 'dead', 'dropped')
   OR (state = 'delivered') != (delivered_at IS NOT NULL);

-- what the agent says in a session arrives in order (promise 7)
SELECT late.key, early.key FROM delivery early
JOIN delivery late ON late.session = early.session AND late.id > early.id
  AND early.kind NOT IN ('notice', 'command') AND late.kind NOT IN ('notice', 'command')
WHERE early.state IN ('pending', 'sending') AND NOT early.repeat AND late.state = 'delivered';

-- a finished step has a result; an unfinished one on record is unsafe (promise 8)
SELECT turn, name, state, effect FROM step
WHERE (state = 'done') != (result IS NOT NULL) OR (state != 'done' AND effect != 'unsafe');

-- a step belongs to a turn
SELECT step.turn, step.name FROM step LEFT JOIN turn ON turn.id = step.turn WHERE turn.id IS NULL;

-- a session's messages are taken in the order of acceptance, unless tried again (promise 2)
SELECT late.id, early.id FROM message early
JOIN message late ON late.session = early.session AND late.seq > early.seq
JOIN turn first ON first.id = early.turn
JOIN turn second ON second.id = late.turn
WHERE first.id > second.id AND first.retry_of IS NULL AND second.retry_of IS NULL
  AND NOT EXISTS (SELECT 1 FROM message retry WHERE retry.session = early.session
    AND retry.seq > early.seq AND retry.turn IS NULL AND retry.body LIKE '%"/retry"%');

-- no message is overtaken by a later one of its session, unless tried again (promise 2)
SELECT late.id, early.id FROM message early
JOIN message late ON late.session = early.session AND late.seq > early.seq
WHERE early.state = 'queued' AND early.turn IS NULL
  AND late.turn IS NOT NULL AND late.state != 'queued'
  AND NOT EXISTS (SELECT 1 FROM message retry WHERE retry.session = early.session
    AND retry.seq > early.seq AND retry.turn IS NULL AND retry.body LIKE '%"/retry"%');
