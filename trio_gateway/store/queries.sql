-- Every statement of the store, with a name and a sentence. The epoch and the attempt in a WHERE
-- are the compare-and-set of _markers: an attempt that is over changes nothing.

-- name: store_id
-- Who this store is.
SELECT CAST(id AS BLOB) FROM store;

-- name: newest_turn
-- The last number that was given to a turn. One that is out of all reason was not.
SELECT coalesce(max(id), 0) FROM turn WHERE id < 4611686018427387904;

-- name: why_ended
-- What was noted when a turn ended.
SELECT error FROM turn WHERE id = ?;

-- name: session_id
-- The number of a session and its conversation, if it was ever seen.
SELECT id, conversation FROM session WHERE channel = ? AND name = ?;

-- name: add_session
-- A session is seen for the first time.
INSERT INTO session (channel, name) VALUES (?, ?);

-- name: new_conversation
-- What came before is not handed to the agent any more.
UPDATE session SET conversation = min(conversation, 4611686018427387904) + 1 WHERE id = ?;

-- name: set_cursor
-- The channel's place moves on, in the transaction of the messages that it covers.
INSERT INTO cursor (channel, value, at) VALUES (?, ?, ?)
ON CONFLICT (channel) DO UPDATE SET value = excluded.value, at = excluded.at;

-- name: get_cursor
-- A channel's place.
SELECT value FROM cursor WHERE channel = ?;

-- name: add_message
-- Insert if absent; a second arrival of the same id changes nothing (promise 1).
INSERT INTO message (channel, id, session, conversation, state, turn, body, accepted_at, ended_at,
                     traceparent)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (channel, id) DO NOTHING;

-- name: add_turn
-- Begin: the marker RUNNING, before any of the agent's code runs (promise 3).
INSERT INTO turn (id, session, conversation, state, epoch, begun_at, attempt_at, retry_of)
VALUES (?1, ?2, ?3, 'RUNNING', ?4, ?5, ?5, ?6);

-- name: waiting_messages
-- What a session has waiting, in the order of acceptance.
SELECT seq, id, CAST(body AS BLOB), turn, conversation, accepted_at, CAST(traceparent AS BLOB)
FROM message WHERE session = ? AND state = 'queued' ORDER BY seq LIMIT ?;

-- name: take_message
-- A turn takes a waiting message.
UPDATE message SET state = 'running', turn = ?, ended_at = NULL, error = NULL WHERE seq = ?;

-- name: end_message
-- One message ends by itself, without a turn that settles it; it belongs to none any more.
UPDATE message SET state = ?, ended_at = ?, error = ?, turn = NULL WHERE seq = ?;

-- name: end_turn
-- Settle the marker: only while the turn is open, in this attempt, in this epoch (promise 6).
UPDATE turn SET state = ?, settled_at = ?, error = ?, reason = NULL
WHERE id = ? AND attempt = ? AND epoch = ? AND state IN ('RUNNING', 'RESUME_PENDING');

-- name: end_pending_turn
-- Recovery ends a turn that it does not resume; no epoch owns it.
UPDATE turn SET state = ?, settled_at = ?, error = ?, reason = NULL
WHERE id = ? AND attempt = ? AND state = 'RESUME_PENDING';

-- name: stop_turn
-- A user stops whatever turn the session has open; nothing brings it back (promise 10).
UPDATE turn SET state = 'STOPPED', settled_at = ?, error = ?, reason = NULL
WHERE session = ? AND settled_at IS NULL RETURNING id;

-- name: end_messages_of
-- The messages that a turn consumed end with it.
UPDATE message SET state = ?, ended_at = ?, error = ? WHERE turn = ? AND state = 'running';

-- name: requeue_messages_of
-- The messages of a turn that was stopped for a newer one wait again, for the next turn.
UPDATE message SET state = 'queued' WHERE turn = ? AND state = 'running';

-- name: stop_waiting
-- With no turn open, /stop ends what waits.
UPDATE message SET state = 'stopped', ended_at = ? WHERE session = ? AND state = 'queued'
RETURNING CAST(id AS BLOB);

-- name: turn_fate
-- How a turn stands: to tell "settled by me, though the commit failed" from "settled by another".
SELECT state, attempt, epoch FROM turn WHERE id = ?;

-- name: open_turn_of
-- The open turn of a session, if any.
SELECT id, state, attempt FROM turn
WHERE session = ? AND settled_at IS NULL;

-- name: count_waiting
-- How many messages of a session wait.
SELECT count(*) FROM message WHERE session = ? AND state = 'queued';

-- name: last_unanswered
-- The newest message that ended, if it ended without an answer: what /retry tries again.
SELECT seq, turn, state FROM message
WHERE session = ? AND body IS NOT NULL
  AND state IN ('answered', 'failed', 'stopped', 'quarantined', 'expired')
  AND (turn IS NOT NULL OR state != 'answered')
ORDER BY seq DESC LIMIT 1;

-- name: retry_turn_messages
-- The messages that ended with a turn wait once more; `turn` keeps what their steps remember.
UPDATE message SET state = 'queued', ended_at = NULL, error = NULL
WHERE turn = ? AND state IN ('failed', 'stopped', 'quarantined', 'expired')
RETURNING CAST(id AS BLOB);

-- name: retry_message
-- One message that never had a turn waits once more.
UPDATE message SET state = 'queued', ended_at = NULL, error = NULL WHERE seq = ?
RETURNING CAST(id AS BLOB);

-- name: mark_resume_pending
-- Every turn of this epoch that is RUNNING, whichever they are, in one statement (promise 4).
-- settled_at IS NULL is the condition of the index turn_open, here and below: it costs what is open.
UPDATE turn SET state = 'RESUME_PENDING', reason = ?, marked_at = ?, marked_up = ?,
                interruptions = min(interruptions, 1000000) + 1
WHERE settled_at IS NULL AND state = 'RUNNING' AND epoch = ?;

-- name: charge_crashed
-- Boot: what is RUNNING was running when its process died; and so, to be safe, was what says of
-- itself neither this nor that. Charged here, before any agent is called (promise 9); interrupted
-- when its epoch was last seen.
UPDATE turn SET state = 'RESUME_PENDING', reason = 'crash', crashes = min(crashes, 1000000) + 1,
  marked_at = max(attempt_at, coalesce((SELECT seen_at FROM epoch WHERE id = turn.epoch), 0)),
  marked_up = (SELECT seen_up FROM epoch WHERE epoch.id = turn.epoch)
WHERE settled_at IS NULL AND state != 'RESUME_PENDING';

-- name: end_lost_turns
-- Boot: a turn whose session is gone (a damaged row) can be answered to nobody.
UPDATE turn SET state = 'FAILED', settled_at = ?, error = ?, reason = NULL
WHERE settled_at IS NULL AND NOT EXISTS (SELECT 1 FROM session WHERE session.id = turn.session)
RETURNING id;

-- name: end_lost_messages
-- Nor can a message that waits in a session that is gone.
UPDATE message SET state = 'failed', ended_at = ?, error = ?, turn = NULL
WHERE state = 'queued' AND NOT EXISTS (SELECT 1 FROM session WHERE session.id = message.session);

-- name: bury_lost_deliveries
-- And a reply to nobody is a dead letter.
UPDATE delivery SET state = 'dead', error = ?
WHERE state IN ('pending', 'sending')
  AND NOT EXISTS (SELECT 1 FROM session WHERE session.id = delivery.session);

-- name: pending_turns
-- Every open turn, with what a verdict needs. A turn's first message gives its place in line.
SELECT turn.id, turn.session, session.channel, session.name, turn.attempt, turn.reason,
       turn.crashes, turn.interruptions, coalesce(turn.marked_at, turn.attempt_at),
       coalesce(turn.marked_up, 0), iif(turn.marked_up IS NULL, '', coalesce(epoch.machine, ''))
FROM turn INDEXED BY turn_open
JOIN session ON session.id = turn.session LEFT JOIN epoch ON epoch.id = turn.epoch
WHERE turn.settled_at IS NULL AND turn.state = 'RESUME_PENDING'
ORDER BY turn.id;

-- name: messages_of
-- The messages that a turn is to answer: those of its own session.
SELECT id, CAST(body AS BLOB), seq, accepted_at, CAST(traceparent AS BLOB) FROM message
WHERE turn = ?1 AND state = 'running' AND session = (SELECT session FROM turn WHERE id = ?1)
ORDER BY seq;

-- name: message_ids_of
-- Their ids alone.
SELECT id FROM message WHERE turn = ? AND state = 'running' ORDER BY seq;

-- name: keep_attempt
-- Before a new attempt begins, the one that was interrupted goes to the record.
INSERT INTO attempt (turn, attempt, epoch, began_at, interrupted_at, reason)
SELECT id, attempt, epoch, attempt_at, coalesce(marked_at, attempt_at), coalesce(reason, 'crash')
FROM turn WHERE id = ? AND attempt = ? AND state = 'RESUME_PENDING'
ON CONFLICT DO NOTHING;

-- name: resume_turn
-- The next attempt: RUNNING again, owned by this epoch.
UPDATE turn SET state = 'RUNNING', attempt = attempt + 1, epoch = ?, attempt_at = ?, reason = NULL
WHERE id = ? AND attempt = ? AND state = 'RESUME_PENDING';

-- name: resumed_turn
-- What the agent of a resumed turn needs beyond its messages.
SELECT CAST(turn.checkpoint AS BLOB), turn.restart_asked, attempt.reason, attempt.interrupted_at
FROM turn JOIN attempt ON attempt.turn = turn.id AND attempt.attempt = turn.attempt - 1
WHERE turn.id = ?;

-- name: waiting_sessions
-- Every session with mail, the one that waits longest first. Costs what waits.
SELECT session.channel, session.name, session.id, count(*), min(message.seq) AS first
FROM message JOIN session ON session.id = message.session
WHERE message.state = 'queued' GROUP BY session.id ORDER BY first;

-- name: progressed
-- A turn got further: planned interruptions are counted anew. Also the check that it is open.
UPDATE turn SET interruptions = 0
WHERE id = ? AND attempt = ? AND epoch = ? AND state IN ('RUNNING', 'RESUME_PENDING');

-- name: set_checkpoint
-- What the agent wants to find when it resumes.
UPDATE turn SET checkpoint = ?, interruptions = 0
WHERE id = ? AND attempt = ? AND epoch = ? AND state IN ('RUNNING', 'RESUME_PENDING');

-- name: ask_restart
-- This turn has asked for a restart; its next attempt is not to ask again (promise 13).
UPDATE turn SET restart_asked = 1 WHERE id = ?;

-- name: is_open
-- Whether an attempt may still write.
SELECT 1 FROM turn
WHERE id = ? AND attempt = ? AND epoch = ? AND state IN ('RUNNING', 'RESUME_PENDING');

-- name: begin_step
-- An unsafe step is about to run: from here on a cut leaves it in doubt (promise 8).
INSERT INTO step (turn, name, state, effect, attempt, began_at) VALUES (?, ?, 'begun', ?, ?, ?)
ON CONFLICT (turn, name) DO UPDATE SET attempt = excluded.attempt, began_at = excluded.began_at;

-- name: finish_step
-- A step's result; no later attempt does it again.
INSERT INTO step (turn, name, state, effect, result, attempt, began_at, done_at)
VALUES (?1, ?2, 'done', ?3, ?4, ?5, ?6, ?7)
ON CONFLICT (turn, name) DO UPDATE SET state = 'done', result = excluded.result,
                                       done_at = excluded.done_at;

-- name: steps_of
-- Everything that a turn remembers.
SELECT CAST(name AS BLOB), state, CAST(result AS BLOB) FROM step WHERE turn = ?;

-- name: copy_steps
-- A turn that is retried goes on from what the first one remembered (promise 8).
INSERT OR IGNORE INTO step SELECT ?1, name, state, effect, result, attempt, began_at, done_at
FROM step WHERE turn = ?2;

-- name: add_delivery
-- Into the outbox, under its stable key; a second insert of the same key changes nothing.
INSERT INTO delivery (key, session, turn, n, part, parts, kind, about, text, attempt, final, state,
                      epoch, created_at, delivered_at, traceparent)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key) DO NOTHING;

-- name: reply_parts
-- What was said before at this place of a turn, attempt by attempt.
SELECT attempt, CAST(text AS BLOB) FROM delivery
WHERE turn = ? AND n = ? AND kind = ? ORDER BY attempt, part;

-- name: deliveries_of
-- What a turn said with its end.
SELECT delivery.id, session.channel, session.name, delivery.key, CAST(delivery.text AS BLOB),
       CAST(delivery.about AS BLOB), delivery.attempt, delivery.final, delivery.repeat,
       delivery.kind, delivery.part, delivery.parts, delivery.turn, delivery.tries,
       delivery.not_before, CAST(delivery.traceparent AS BLOB)
FROM delivery JOIN session ON session.id = delivery.session
WHERE delivery.turn = ? AND delivery.kind IN ('answer', 'apology')
  AND delivery.state IN ('pending', 'sending')
ORDER BY delivery.id;

-- name: open_deliveries
-- Every reply that was committed and has not arrived, in order. Costs what is open.
SELECT delivery.id, session.channel, session.name, delivery.key, CAST(delivery.text AS BLOB),
       CAST(delivery.about AS BLOB), delivery.attempt, delivery.final, delivery.repeat,
       delivery.kind, delivery.part, delivery.parts, delivery.turn, delivery.tries,
       delivery.not_before, CAST(delivery.traceparent AS BLOB)
FROM delivery JOIN session ON session.id = delivery.session
WHERE delivery.state IN ('pending', 'sending') ORDER BY delivery.id;

-- name: drop_old_notices
-- News of an earlier epoch is no news.
UPDATE delivery SET state = 'dropped'
WHERE state IN ('pending', 'sending') AND kind = 'notice' AND epoch != ?;

-- name: doubt_sending
-- Boot: what was being sent may have arrived; it is sent again and says so (promise 7).
UPDATE delivery SET state = 'pending', repeat = 1
WHERE state IN ('pending', 'sending') AND state = 'sending';

-- name: delivery_sending
-- About to be sent over a wire that cannot recognise a repeat.
UPDATE delivery SET state = 'sending' WHERE id = ? AND state = 'pending';

-- name: delivery_arrived
-- The platform has it.
UPDATE delivery SET state = 'delivered', delivered_at = ?, tries = ?, error = NULL
WHERE id = ? AND state IN ('pending', 'sending');

-- name: delivery_delayed
-- It is tried again, not before a moment.
UPDATE delivery SET state = 'pending', tries = ?, not_before = ?, error = ?, repeat = repeat OR ?
WHERE id = ? AND state IN ('pending', 'sending');

-- name: delivery_dead
-- It is given up; a person can retry it.
UPDATE delivery SET state = 'dead', tries = ?, error = ?
WHERE id = ? AND state IN ('pending', 'sending');

-- name: delivery_dropped
-- A notice that could not be sent in time.
UPDATE delivery SET state = 'dropped', error = ? WHERE id = ? AND state IN ('pending', 'sending');

-- name: add_epoch
-- A new life of a process.
INSERT INTO epoch (pid, machine, started_at, seen_at, seen_up) VALUES (?, ?, ?, ?, ?);

-- name: last_ending
-- How the life before this one ended; NULL: it died.
SELECT ending FROM epoch ORDER BY id DESC LIMIT 1;

-- name: touch_epoch
-- This process is alive.
UPDATE epoch SET seen_at = ?, seen_up = ? WHERE id = ?;

-- name: end_epoch
-- This process leaves in order.
UPDATE epoch SET seen_at = ?1, seen_up = ?2, ended_at = ?1, ending = ?3 WHERE id = ?4;

-- name: count_open
-- All messages that have not reached an end. Costs what is open.
SELECT (SELECT count(*) FROM message WHERE state = 'queued')
     + (SELECT count(*) FROM turn INDEXED BY turn_open CROSS JOIN message ON message.turn = turn.id
        WHERE turn.settled_at IS NULL AND message.state = 'running');

-- name: old_messages
-- One bite of retention: messages in the order of acceptance.
SELECT seq, id, turn, state, ended_at, body IS NOT NULL FROM message
WHERE seq > ? ORDER BY seq LIMIT ?;

-- name: forget_text
-- The text of a settled message is old enough to go; its id stays known.
UPDATE message SET body = NULL WHERE seq = ?;

-- name: forget_replies
-- What was said in answer goes with it.
UPDATE delivery SET text = NULL WHERE turn = ? AND state IN ('delivered', 'dropped');

-- name: forget_steps
-- And what was remembered to make it.
DELETE FROM step WHERE turn = ?;

-- name: forget_message
-- The id itself is old enough to go.
DELETE FROM message WHERE seq = ?;

-- name: forget_deliveries
-- With the deliveries of its turn,
DELETE FROM delivery WHERE turn = ? AND state IN ('delivered', 'dropped');

-- name: forget_attempts
-- its attempts,
DELETE FROM attempt WHERE turn = ?;

-- name: forget_turn
-- and the turn, once no message names it. The newest turn stays: ids are never given twice.
DELETE FROM turn WHERE id = ?1 AND state NOT IN ('RUNNING', 'RESUME_PENDING')
  AND NOT EXISTS (SELECT 1 FROM message WHERE message.turn = ?1)
  AND id < (SELECT max(id) FROM turn);

-- name: forget_loose
-- Answers to commands and notices belong to no turn; they go by their own age.
DELETE FROM delivery
WHERE turn IS NULL AND created_at < ? AND state IN ('delivered', 'dropped');

-- name: forget_journal
-- One bite of the journal that is as old as texts that go. The newest row stays: no number twice.
DELETE FROM journal WHERE seq < (SELECT max(seq) FROM journal) AND seq IN
  (SELECT seq FROM (SELECT seq, at FROM journal WHERE seq > 0 ORDER BY seq LIMIT ?2) WHERE at < ?1);

-- name: pulled_channels
-- Channels whose sessions have a journal.
SELECT channel FROM pulled WHERE channel > '';

-- name: pull
-- One more.
INSERT INTO pulled (channel) VALUES (?);

-- name: arrive_pulled
-- What was on its way there has arrived, too.
UPDATE delivery SET state = 'delivered', delivered_at = ?1
WHERE state IN ('pending', 'sending')
  AND session IN (SELECT id FROM session WHERE channel = ?2);

-- name: pull_no_more
-- One fewer.
DELETE FROM pulled WHERE channel = ?;

-- name: add_draft
-- A reply grows.
INSERT INTO journal (session, at, what, turn, attempt, detail)
SELECT session, ?1, 'draft', id, ?2, ?3 FROM turn WHERE id = ?4;

-- name: quarantined_session
-- The session of a turn that was put aside.
SELECT session.channel, session.name, session.id FROM turn JOIN session ON session.id = turn.session
WHERE turn.id = ? AND turn.state = 'QUARANTINED';

-- name: one_delivery
-- One delivery that is on its way.
SELECT delivery.id, session.channel, session.name, delivery.key, CAST(delivery.text AS BLOB),
       CAST(delivery.about AS BLOB), delivery.attempt, delivery.final, delivery.repeat,
       delivery.kind, delivery.part, delivery.parts, delivery.turn, delivery.tries,
       delivery.not_before, CAST(delivery.traceparent AS BLOB)
FROM delivery JOIN session ON session.id = delivery.session
WHERE delivery.id = ? AND delivery.state IN ('pending', 'sending');

-- name: journal_of
-- What happened in a session since a place in its journal. A turn's messages are those that name
-- it now.
SELECT journal.seq, journal.at, journal.what, message.id, CAST(message.body AS BLOB), journal.turn,
       journal.attempt, CAST(journal.detail AS BLOB), delivery.key, CAST(delivery.text AS BLOB),
       delivery.kind, delivery.final, CAST(delivery.about AS BLOB), journal.delivery
FROM session JOIN journal ON journal.session = session.id
LEFT JOIN message ON message.seq = journal.message
LEFT JOIN delivery ON delivery.id = journal.delivery
WHERE session.channel = ?1 AND session.name = ?2 AND journal.seq > ?3
  AND (?4 OR journal.what != 'draft')
ORDER BY journal.seq LIMIT ?5;

-- name: journal_since
-- What happened in all sessions of a channel since a place.
SELECT session.name, journal.seq, journal.at, journal.what, message.id, CAST(message.body AS BLOB),
       journal.turn, journal.attempt, CAST(journal.detail AS BLOB), delivery.key,
       CAST(delivery.text AS BLOB), delivery.kind, delivery.final, CAST(delivery.about AS BLOB),
       journal.delivery
FROM journal JOIN session ON session.id = journal.session
LEFT JOIN message ON message.seq = journal.message
LEFT JOIN delivery ON delivery.id = journal.delivery
WHERE journal.seq > ?1 AND session.channel = ?2
ORDER BY journal.seq LIMIT ?3;

-- name: journal_newest
-- The newest place of all.
SELECT coalesce(max(seq), 0) FROM journal;

-- name: journal_place
-- Where the journal of a message begins, and in which session.
SELECT session.name, min(journal.seq) FROM message JOIN session ON session.id = message.session
JOIN journal ON journal.message = message.seq
WHERE message.channel = ? AND message.id = ? GROUP BY session.name;

-- name: journal_about
-- What happened to one message.
SELECT journal.seq, journal.at, journal.what, journal.turn, CAST(journal.detail AS BLOB)
FROM message JOIN journal ON journal.message = message.seq
WHERE message.channel = ? AND message.id = ? ORDER BY journal.seq;

-- name: journal_end
-- The newest place in a session's journal, and the oldest that is left where some of it is not:
-- numbers are the store's, so that a session's first one tells nothing.
SELECT max(journal.seq),
       iif(EXISTS (SELECT 1 FROM journal AS first WHERE first.what = 'accepted' AND first.message =
                   (SELECT min(seq) FROM message WHERE message.session = session.id)),
           0, min(journal.seq))
FROM session JOIN journal ON journal.session = session.id
WHERE session.channel = ? AND session.name = ?;

-- name: messages_page
-- Messages of a session before a place, newest first.
SELECT seq, id, state, CAST(body AS BLOB), accepted_at, ended_at, error, turn FROM message
WHERE session = ?1 AND seq < ?2 ORDER BY seq DESC LIMIT ?3;

-- name: message_ids_with
-- The messages that name a turn.
SELECT id FROM message WHERE turn = ? ORDER BY seq;

-- name: quarantined_turn
-- A turn that was put aside.
SELECT id, session FROM turn WHERE id = ? AND state = 'QUARANTINED';

-- name: drop_quarantined
-- A person gives a quarantined turn's messages up: they end for good.
UPDATE message SET state = 'failed', error = 'dropped from quarantine'
WHERE turn = ? AND state = 'quarantined' RETURNING CAST(id AS BLOB);

-- name: retry_dead
-- A person sends a dead letter again; an earlier try may have arrived.
UPDATE delivery SET state = 'pending', tries = 0, not_before = NULL, repeat = 1
WHERE id = ? AND state = 'dead' RETURNING id;

-- name: drop_dead
-- A person gives a dead letter up.
UPDATE delivery SET state = 'dropped' WHERE id = ? AND state = 'dead' RETURNING id;

-- name: history
-- The past of a conversation before a point, newest first: messages that some turn took.
SELECT message.seq, message.id, CAST(message.body AS BLOB), message.accepted_at, message.turn
FROM message
WHERE message.session = ? AND message.seq < ? AND message.conversation = ?
  AND message.turn IS NOT NULL AND message.body IS NOT NULL AND message.state != 'queued'
ORDER BY message.seq DESC LIMIT ?;

-- name: said_in
-- What a turn said, in order.
SELECT n, CAST(group_concat(text, '') AS BLOB), max(created_at) FROM
  (SELECT id, n, kind, attempt, text, created_at FROM delivery WHERE turn = ? AND text IS NOT NULL
   AND kind IN ('say', 'answer', 'apology') ORDER BY id)
GROUP BY n, kind, attempt ORDER BY min(id);

-- name: place_of_turn
-- Where a turn stands in its session: before its first message is the past.
SELECT turn.session, turn.conversation, min(message.seq)
FROM turn JOIN message ON message.turn = turn.id WHERE turn.id = ?;

-- name: place_of_session
-- Where a session stands now.
SELECT id, conversation FROM session WHERE channel = ? AND name = ?;

-- name: list_sessions
-- Sessions, the one with the newest message first.
SELECT session.channel, session.name, turn.id, turn.state, turn.attempt, turn.reason,
  (SELECT count(*) FROM message WHERE message.session = session.id AND message.state = 'queued'),
  (SELECT max(seq) FROM message WHERE message.session = session.id) AS newest,
  (SELECT accepted_at FROM message WHERE message.session = session.id ORDER BY seq DESC LIMIT 1)
FROM session LEFT JOIN turn
  ON turn.session = session.id AND turn.settled_at IS NULL
ORDER BY newest DESC LIMIT ?;

-- name: sessions_named
-- Sessions by their bare name, in whichever channels.
SELECT channel, name FROM session WHERE name = ?;

-- name: session_messages
-- A session's messages, newest first.
SELECT id, state, CAST(body AS BLOB), accepted_at, ended_at, error, turn FROM message
WHERE session = ? ORDER BY seq DESC LIMIT ?;

-- name: find_message
-- A message by its id, in whichever channels.
SELECT message.seq, message.channel, session.name, message.id, message.state,
       CAST(message.body AS BLOB), message.accepted_at, message.ended_at, message.error, message.turn
FROM message JOIN session ON session.id = message.session WHERE message.id = ?
ORDER BY message.seq;

-- name: one_message
-- A message by its channel and id.
SELECT session.name, message.id, message.state, CAST(message.body AS BLOB), message.accepted_at,
       message.ended_at, message.error, message.turn
FROM message JOIN session ON session.id = message.session
WHERE message.channel = ? AND message.id = ?;

-- name: turn_row
-- One turn, whole.
SELECT id, state, attempt, epoch, reason, crashes, interruptions, begun_at, attempt_at, marked_at,
       settled_at, retry_of, checkpoint IS NOT NULL, error
FROM turn WHERE id = ?;

-- name: attempts_of
-- The attempts of a turn that were interrupted.
SELECT attempt, epoch, began_at, interrupted_at, reason FROM attempt WHERE turn = ? ORDER BY attempt;

-- name: step_rows
-- A turn's steps, in the order in which they began.
SELECT name, state, effect, attempt, began_at, done_at FROM step WHERE turn = ? ORDER BY began_at;

-- name: delivery_rows_of_turn
-- What a turn said, and how that travelled.
SELECT id, key, kind, part, parts, NULL, state, tries, error, repeat, created_at, delivered_at,
       attempt
FROM delivery WHERE turn = ? ORDER BY id;

-- name: delivery_rows_about
-- What was said to a message that no turn took (a command, an unreadable row).
SELECT id, key, kind, part, parts, NULL, state, tries, error, repeat, created_at, delivered_at,
       attempt
FROM delivery INDEXED BY delivery_loose WHERE turn IS NULL AND session = (SELECT session FROM message WHERE seq = ?1)
  AND created_at >= (SELECT accepted_at FROM message WHERE seq = ?1)
  AND about = ?2 ORDER BY id;

-- name: list_quarantined
-- Turns that were put aside and wait for a person.
SELECT turn.id, session.channel, session.name, turn.crashes, turn.interruptions, turn.attempt,
       turn.begun_at, turn.settled_at, turn.error
FROM turn JOIN session ON session.id = turn.session
WHERE turn.state = 'QUARANTINED' AND EXISTS
  (SELECT 1 FROM message WHERE message.turn = turn.id AND message.state = 'quarantined')
ORDER BY turn.id;

-- name: bodies_of
-- The messages of a turn, whatever became of them.
SELECT id, CAST(body AS BLOB), state FROM message WHERE turn = ? ORDER BY seq;

-- name: list_dead
-- Deliveries that were given up; also those to a session that is gone.
SELECT delivery.id, coalesce(session.channel, '?'), coalesce(session.name, '?'), delivery.key,
       CAST(delivery.text AS BLOB), delivery.tries, delivery.error, delivery.created_at,
       delivery.turn
FROM delivery LEFT JOIN session ON session.id = delivery.session
WHERE delivery.state = 'dead' ORDER BY delivery.id;

-- name: list_inbox
-- Messages that wait for their turns, the oldest first.
SELECT session.channel, session.name, message.id, message.state, CAST(message.body AS BLOB),
       message.accepted_at, message.ended_at, message.error, message.turn
FROM message INDEXED BY message_queued CROSS JOIN session ON session.id = message.session
WHERE message.state = 'queued' ORDER BY message.seq LIMIT ?;

-- name: list_outbox
-- Deliveries that are on their way, the oldest first.
SELECT delivery.id, session.channel, session.name, delivery.key, CAST(delivery.text AS BLOB),
       delivery.tries, delivery.error, delivery.created_at, delivery.not_before
FROM delivery INDEXED BY delivery_open CROSS JOIN session ON session.id = delivery.session
WHERE delivery.state IN ('pending', 'sending') ORDER BY delivery.id LIMIT ?;

-- name: list_astray
-- Messages that no gateway will ever come to, because a row was damaged: neither waiting, nor
-- ended, nor in the hands of an open turn. Costs what is stored: for the doctor.
SELECT message.id FROM message
LEFT JOIN turn ON turn.id = message.turn AND turn.settled_at IS NULL
WHERE turn.id IS NULL AND message.state NOT IN
  ('queued', 'answered', 'failed', 'stopped', 'quarantined', 'expired')
ORDER BY message.seq LIMIT ?;

-- name: counts
-- What is open, in numbers.
SELECT
  (SELECT count(*) FROM turn WHERE settled_at IS NULL AND state = 'RUNNING'),
  (SELECT count(*) FROM turn
   WHERE settled_at IS NULL AND state = 'RESUME_PENDING'),
  (SELECT count(*) FROM message WHERE state = 'queued'),
  (SELECT count(*) FROM delivery WHERE state IN ('pending', 'sending')),
  (SELECT count(*) FROM delivery WHERE state = 'dead'),
  (SELECT count(*) FROM turn INDEXED BY turn_quarantined
   CROSS JOIN message ON message.turn = turn.id
   WHERE turn.state = 'QUARANTINED' AND message.state = 'quarantined');

-- name: gauges
-- What is open, for whoever watches: each number counts no further than a limit. A delivery's
-- number follows the order of the commits, so the first one is the oldest.
SELECT
  (SELECT count(*) FROM (SELECT 1 FROM turn INDEXED BY turn_open
                         WHERE settled_at IS NULL AND state = 'RUNNING' LIMIT ?1)),
  (SELECT count(*) FROM (SELECT 1 FROM turn INDEXED BY turn_open
                         WHERE settled_at IS NULL AND state = 'RESUME_PENDING' LIMIT ?1)),
  (SELECT count(*) FROM (SELECT 1 FROM message WHERE state = 'queued' LIMIT ?1)),
  (SELECT count(*) FROM (SELECT 1 FROM delivery INDEXED BY delivery_open
                         WHERE state IN ('pending', 'sending') LIMIT ?1)),
  (SELECT created_at FROM delivery INDEXED BY delivery_open
   WHERE state IN ('pending', 'sending') ORDER BY id LIMIT 1),
  (SELECT count(*) FROM (SELECT 1 FROM delivery WHERE state = 'dead' LIMIT ?1)),
  (SELECT count(*) FROM (SELECT 1 FROM turn INDEXED BY turn_quarantined
                         CROSS JOIN message ON message.turn = turn.id
                         WHERE turn.state = 'QUARANTINED' AND message.state = 'quarantined'
                         LIMIT ?1));

-- name: open_turns
-- Every open turn and its marker.
SELECT turn.id, session.channel, session.name, turn.state, turn.attempt, turn.reason, turn.begun_at,
       turn.crashes, turn.interruptions
FROM turn INDEXED BY turn_open JOIN session ON session.id = turn.session
WHERE turn.settled_at IS NULL ORDER BY turn.id;

-- name: replies_to_turn
-- What a settled turn said, for whoever asks again.
SELECT n, kind, attempt, part, parts, key, CAST(text AS BLOB), final, CAST(about AS BLOB)
FROM delivery
WHERE turn = ? AND kind IN ('say', 'answer', 'apology') ORDER BY id;

-- name: message_fate
-- How one message of a channel stands.
SELECT state, turn, seq FROM message WHERE channel = ? AND id = ?;

-- name: replies_about
-- What was said to a message that no turn took.
SELECT n, kind, attempt, part, parts, key, CAST(text AS BLOB), final, CAST(about AS BLOB)
FROM delivery INDEXED BY delivery_loose
WHERE turn IS NULL AND session = (SELECT session FROM message WHERE seq = ?1)
  AND created_at >= (SELECT accepted_at FROM message WHERE seq = ?1)
  AND about = ?2 ORDER BY id;

-- name: session_of_message
-- The session that a message belongs to.
SELECT session.channel, session.name FROM message JOIN session ON session.id = message.session
WHERE message.seq = ?;

-- name: session_of_turn
-- The session that a turn belongs to.
SELECT session.channel, session.name FROM turn JOIN session ON session.id = turn.session
WHERE turn.id = ?;
