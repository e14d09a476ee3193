//! The names of the directory's numbers. The command, the metrics and the dispatcher's status use
//! the same ones.

/// Each number with its meaning. A name that ends in `_total` counts since the start; the others
/// are states.
pub const NUMBERS: [(&str, &str); 25] = [
    ("ids", "Registered client ids of all hosts"),
    ("ids_in_grace", "Ids whose client has gone and may come back"),
    ("members", "Workers that are known, those of other hosts included"),
    ("hosts", "Hosts that are known, the own one included"),
    ("groups", "Groups that a member is in, sends to or watches"),
    ("memberships", "Memberships of this host, and groups that its members send to"),
    ("watches", "Ids and groups that members of this host watch"),
    ("linked_pairs", "Pairs of workers that were given a link"),
    ("lookups_waiting", "Look-ups that wait for the end of a grace"),
    ("registered_total", "Registrations"),
    ("superseded_total", "Registrations that a newer one of the same id has ended"),
    ("lookups_total", "Look-ups of ids"),
    ("lookups_found_total", "Look-ups that found a registration"),
    ("lookups_waited_total", "Look-ups that waited for a client to come back"),
    ("lookups_overdue_total", "Look-ups that waited for a whole grace"),
    ("stamps_ahead_total", "Registrations whose stamp was too far ahead of the clock"),
    ("links_total", "Links given to two workers"),
    ("not_accepted_total", "Registrations, memberships, watches and links refused at a limit"),
    ("queued_bytes", "Bytes that wait to be sent to workers"),
    ("gateway_bytes", "Bytes of messages to and from other hosts that wait"),
    ("connections_waiting", "Connections that have not said hello"),
    ("refused_total", "Connections refused"),
    ("cut_total", "Connections ended because they broke the protocol or did not read"),
    ("scrapes_total", "Requests for these metrics"),
    ("scrapes_refused_total", "Connections for metrics that were too many"),
];
