//! Routes: where the registration of an id is, and messages that wait to know.

use std::collections::VecDeque;
use std::sync::Arc;

use dispatch_protocol::relay::frame::flag;
use dispatch_protocol::relay::{Id, Location, ToDirectory};

use super::groups::{Fan, Kind};
use super::{Done, Engine, Outbound, Request, Verdict, What};
use crate::relay::Outcome;

/// One recipient.
pub(super) struct Route {
    state: State,
    /// Messages that wait for a look-up, in order.
    waiting: VecDeque<Outbound>,
    /// Messages that did not find the recipient where it should have been; before the others.
    again: VecDeque<Outbound>,
    /// Messages on their way.
    in_flight: u32,
    /// The newest registration that was known and is not there any more. A directory that has just
    /// started may for a moment know only an older one: what goes there would be out of order.
    stale: u64,
}

enum State {
    /// The directory is asked with the next message.
    Unknown,
    /// The directory was asked.
    Asked,
    Known(Vec<Location>),
    /// The place is wrong; the directory is asked when no message is on its way any more.
    Stale,
}

impl Route {
    pub(super) fn waits(&self) -> bool {
        !self.waiting.is_empty() || !self.again.is_empty()
    }

    fn is_idle(&self) -> bool {
        !self.waits() && self.in_flight == 0 && !matches!(self.state, State::Asked)
    }
}

impl Engine {
    /// Sends to an id.
    pub(crate) fn send_to_id(&mut self, now: u64, id: &Id, payload: Arc<[u8]>, done: Done) {
        self.stats.sent += 1;
        let deadline = now.saturating_add(self.settings.timeout);
        let what = What::Id { id: id.clone(), again: false };
        let message = Outbound { payload, what, done, deadline };
        if self.closed {
            return self.finish(message.done, Outcome::Lost);
        }
        match self.routes.get(id) {
            Some(route) if matches!(route.state, State::Known(_)) && !route.waits() => {
                self.dispatch(now, id, message);
            }
            Some(route) => {
                let ask = matches!(route.state, State::Unknown);
                self.wait_for_route(id, message);
                if ask {
                    self.ask(id);
                }
            }
            None => {
                if self.routes.len() >= self.settings.routes {
                    self.routes.retain(|_, route| !route.is_idle());
                }
                if self.routes.len() >= self.settings.routes {
                    return self.finish(message.done, Outcome::Backpressure);
                }
                let route = Route {
                    state: State::Asked,
                    waiting: VecDeque::new(),
                    again: VecDeque::new(),
                    in_flight: 0,
                    stale: 0,
                };
                self.routes.insert(id.clone(), route);
                self.ask(id);
                self.wait_for_route(id, message);
            }
        }
        self.settle(now);
    }

    fn wait_for_route(&mut self, id: &Id, message: Outbound) {
        let size = message.payload.len() + dispatch_protocol::relay::frame::MAX_OVERHEAD;
        let room =
            self.waiting_bytes == 0 || self.waiting_bytes + size <= self.settings.waiting_bytes;
        let most = self.settings.waiting;
        match self.routes.get_mut(id) {
            Some(route) if room && route.waiting.len() < most => {
                self.waiting_bytes += size;
                route.waiting.push_back(message);
            }
            _ => self.finish(message.done, Outcome::Backpressure),
        }
    }

    pub(super) fn ask(&mut self, id: &Id) {
        self.stats.lookups += 1;
        let request = self.number();
        self.requests.insert(request, Request::Lookup { id: id.clone() });
        let Some(route) = self.routes.get_mut(id) else { return };
        route.state = State::Asked;
        let stale = route.stale;
        self.tell(&ToDirectory::Lookup { request, id: id.clone(), stale });
    }

    /// Sends one message to where the id is known to be.
    fn dispatch(&mut self, now: u64, id: &Id, message: Outbound) {
        let Some(route) = self.routes.get_mut(id) else {
            return self.finish(message.done, Outcome::Lost);
        };
        let State::Known(places) = &route.state else {
            return self.finish(message.done, Outcome::Lost);
        };
        let request = matches!(message.done, Done::Request(..));
        let newest = places.iter().max_by_key(|place| (place.stamp, place.host)).cloned();
        match &places[..] {
            [] => self.finish(message.done, Outcome::NotFound),
            [_, _, ..] if !request => {
                let places = places.clone();
                self.dispatch_to_all(id, &places, message);
            }
            _ => {
                let Some(place) = newest else { return };
                route.in_flight += 1;
                if place.member == self.own {
                    let number = self.number();
                    let reply = request.then(|| self.own_reply(number));
                    let payload = Arc::clone(&message.payload);
                    let verdict =
                        self.deliver(false, id.as_bytes(), place.key.into(), payload, reply);
                    if verdict == Verdict::Delivered {
                        self.route_answered(id);
                        let own = self.own;
                        return self.delivered(now, message.done, own, number);
                    }
                    return self.verdicts.push_back((message, verdict));
                }
                let flags = if request { flag::REQUEST } else { 0 };
                let (host, member, key) = (place.host, place.member, place.key.into());
                let sent = self.transmit(host, member, flags, key, id.as_bytes(), message);
                if let Err(message) = sent {
                    self.verdicts.push_back((message, Verdict::Full));
                }
            }
        }
    }

    fn dispatch_to_all(&mut self, id: &Id, places: &[Location], message: Outbound) {
        let fan = self.number();
        let parts = places.len() as u32;
        self.fans.insert(fan, Fan::new(Kind::All(message.done), parts));
        for place in places {
            let part = Outbound {
                payload: Arc::clone(&message.payload),
                what: What::Part { fan, memberships: 1, id: Some(id.clone()) },
                done: Done::Counted,
                deadline: message.deadline,
            };
            let payload = Arc::clone(&message.payload);
            if place.member == self.own {
                let verdict = self.deliver(false, id.as_bytes(), place.key.into(), payload, None);
                self.verdicts.push_back((part, verdict));
                continue;
            }
            let (host, member, key) = (place.host, place.member, place.key.into());
            if let Err(part) = self.transmit(host, member, 0, key, id.as_bytes(), part) {
                self.verdicts.push_back((part, Verdict::Full));
            }
        }
    }

    /// A message to the id has arrived, or has an outcome that says nothing about its place.
    pub(super) fn route_answered(&mut self, id: &Id) {
        let Some(route) = self.routes.get_mut(id) else { return };
        route.in_flight = route.in_flight.saturating_sub(1);
        if route.in_flight == 0 && matches!(route.state, State::Stale) {
            if route.waits() {
                self.ask(id);
            } else {
                route.state = State::Unknown;
            }
        }
    }

    pub(super) fn settle_id(&mut self, mut message: Outbound, verdict: Verdict) {
        let What::Id { id, again } = &mut message.what else { return };
        let id = id.clone();
        match verdict {
            Verdict::Delivered => self.finish(message.done, Outcome::Delivered),
            Verdict::Full => self.finish(message.done, Outcome::Backpressure),
            Verdict::Lost | Verdict::Spread(..) => self.finish(message.done, Outcome::Lost),
            Verdict::NotHere => {
                if let Some(route) = self.routes.get_mut(&id) {
                    if let State::Known(places) = &route.state {
                        let newest = places.iter().map(|place| place.stamp).max();
                        route.stale = route.stale.max(newest.unwrap_or(0));
                    }
                    route.state = State::Stale;
                    if *again {
                        self.finish(message.done, Outcome::NotFound);
                    } else {
                        *again = true;
                        // What waits was within the limits before.
                        self.waiting_bytes +=
                            message.payload.len() + dispatch_protocol::relay::frame::MAX_OVERHEAD;
                        route.again.push_back(message);
                    }
                } else {
                    self.finish(message.done, Outcome::NotFound);
                }
            }
        }
        self.route_answered(&id);
    }

    /// A registration that a message to all found no more: look again next time.
    pub(super) fn distrust(&mut self, id: &Id) {
        if let Some(route) = self.routes.get_mut(id)
            && matches!(route.state, State::Known(_))
        {
            route.state = State::Stale;
            route.in_flight += 1;
            self.route_answered(id);
        }
    }

    /// The directory's answer to a look-up.
    pub(super) fn found(&mut self, now: u64, id: &Id, places: Vec<Location>) {
        let Some(route) = self.routes.get_mut(id) else { return };
        let nowhere = places.is_empty();
        route.state = State::Known(places);
        let mut waiting = std::mem::take(&mut route.again);
        waiting.append(&mut route.waiting);
        for message in waiting {
            self.waiting_bytes -=
                message.payload.len() + dispatch_protocol::relay::frame::MAX_OVERHEAD;
            // An earlier one may have found that this place is wrong, too.
            match self.routes.get_mut(id) {
                Some(route) if matches!(route.state, State::Known(_)) => {
                    self.dispatch(now, id, message);
                    self.settle(now);
                }
                Some(_) => self.wait_for_route(id, message),
                None => self.finish(message.done, Outcome::NotFound),
            }
        }
        // Nowhere is not remembered: the id may register at any time.
        if nowhere
            && let Some(route) = self.routes.get_mut(id)
            && route.is_idle()
        {
            route.state = State::Unknown;
            if route.stale == 0 {
                self.routes.remove(id);
            }
        }
    }

    pub(super) fn expire_routes(&mut self, now: u64) {
        if self.waiting_bytes == 0 {
            return;
        }
        let mut expired = Vec::new();
        for route in self.routes.values_mut() {
            for queue in [&mut route.again, &mut route.waiting] {
                while queue.front().is_some_and(|message| message.deadline <= now) {
                    expired.extend(queue.pop_front());
                }
            }
        }
        for message in expired {
            self.waiting_bytes -=
                message.payload.len() + dispatch_protocol::relay::frame::MAX_OVERHEAD;
            // Whether the id is registered is unknown: the directory has not answered.
            self.finish(message.done, Outcome::Lost);
        }
    }

    /// Asks again for what an earlier directory has not answered.
    pub(super) fn ask_again(&mut self) {
        let asked =
            |(id, route): (&Id, &Route)| matches!(route.state, State::Asked).then(|| id.clone());
        let ids: Vec<Id> = self.routes.iter().filter_map(asked).collect();
        self.requests.retain(|_, request| !matches!(request, Request::Lookup { .. }));
        ids.iter().for_each(|id| self.ask(id));
    }

    fn own_reply(&self, sequence: u64) -> crate::relay::message::ReplyTo {
        crate::relay::message::ReplyTo { member: self.own, generation: 0, sequence }
    }
}
