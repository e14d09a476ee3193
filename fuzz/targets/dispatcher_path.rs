//! The dispatcher's receive path on a real socket: no descriptor stays open, no call waits, and the
//! result is that of the record.

use dispatch_protocol::wire::{Control, MAX_CONTROL_RECORD};

use super::dispatcher_fuzzing::{FromControl, from_control};
use super::sockets::{Delivery, ReceivePath, alternating, checked, file, pair, send, with_room};

/// Does nothing with an input for another path.
pub fn dispatcher_path(data: &[u8]) {
    let delivery = Delivery::new(data);
    if delivery.path == ReceivePath::Dispatcher {
        checked(|| to_dispatcher(&delivery));
    }
}

fn to_dispatcher(delivery: &Delivery<'_>) {
    let &Delivery { count, room, closes, record, .. } = delivery;
    let (ours, theirs) = pair();
    let (one, other) = (file(), file());
    if !send(&theirs, record, &alternating(&one, &other, count)) {
        return;
    }
    let _theirs = (!closes).then_some(theirs);
    let received = with_room(room, || from_control(&ours));
    match (received, Control::decode(record)) {
        (FromControl::Broken(why), _) if count > 0 => assert!(why.contains("descriptors")),
        (_, _) if count > 0 => panic!("{count} descriptors were overlooked"),
        (FromControl::End, _) => assert!(record.is_empty()),
        (FromControl::Record(received), Ok(sent)) => assert_eq!(received, sent),
        (FromControl::Broken(why), Err(error)) => {
            let long = record.len() > MAX_CONTROL_RECORD;
            assert!(long && why.contains("longer") || why == error.to_string(), "{why}");
        }
        (received, sent) => panic!("{sent:?} became {received:?}"),
    }
    match from_control(&ours) {
        FromControl::End => assert!(closes),
        FromControl::Empty => assert!(!closes),
        more => panic!("{more:?}"),
    }
}
