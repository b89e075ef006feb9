//! Networks of a captured VM: each clone has its own, with its own addresses and ports of the host.

use super::props::Props;
use super::rules::options;

/// NICs that QEMU can migrate.
const NICS: [&str; 14] = [
    "virtio-net-pci",
    "virtio-net-pci-non-transitional",
    "virtio-net-pci-transitional",
    "virtio-net-device",
    "e1000",
    "e1000-82544gc",
    "e1000-82545em",
    "e1000e",
    "igb",
    "rtl8139",
    "ne2k_pci",
    "pcnet",
    "vmxnet3",
    "usb-net",
];

/// True for a network card.
pub fn is_nic(driver: &str) -> bool {
    NICS.contains(&driver)
}

/// Options of a user-mode network that name nothing of the host.
const USER: [&str; 24] = [
    "type",
    "id",
    "netdev",
    "name",
    "ipv4",
    "ipv6",
    "net",
    "host",
    "ipv6-net",
    "ipv6-prefix",
    "ipv6-prefixlen",
    "ipv6-host",
    "restrict",
    "hostname",
    "dhcpstart",
    "dns",
    "ipv6-dns",
    "dnssearch",
    "domainname",
    "tftp-server-name",
    "bootfile",
    "model",
    "addr",
    "vectors",
];

/// Gathers the networks of a command line.
#[derive(Debug, Default)]
pub struct Networks {
    cards: usize,
    unnamed: usize,
    ports: Vec<(String, String)>,
    /// True when the command line says what network there is.
    pub given: bool,
    /// What clones cannot have.
    pub refused: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl Networks {
    /// The address of the next network card.
    pub fn mac(&mut self) -> String {
        self.cards += 1;
        match self.cards {
            1 => "{mac}".into(),
            number => format!("{{mac:{}}}", number - 1),
        }
    }

    /// A `-netdev`, `-nic` or `-net`; gives the one of clones.
    pub fn option(&mut self, option: &str, text: &str) -> Option<String> {
        self.given = true;
        let said = format!("-{option} {text}");
        let Some(mut props) = Props::parse(text, "type").filter(|p| !p.has_braces()) else {
            self.refused.push(format!("{said}, which cannot be taken apart"));
            return None;
        };
        props.lead_with("type");
        let kind = props.get("type").unwrap_or_default().to_owned();
        match kind.as_str() {
            "none" if option != "netdev" => return Some(text.to_owned()),
            "nic" if option == "net" => {}
            "user" => self.user(&said, &mut props)?,
            "tap" => self.tap(&said, &mut props)?,
            "bridge" => {
                let odd = odd(&props, &["type", "id", "br", "helper", "model", "mac", "name", "netdev"]);
                self.refuse_odd(&said, &odd)?;
                self.shared(&said);
            }
            other => {
                self.refused.push(format!("{said}: a network of kind {other}"));
                return None;
            }
        }
        // Its link is set by that name.
        if is_shared(&kind) && props.get("id").is_none() {
            self.unnamed += 1;
            props.set("id", &format!("stencil-net-{}", self.unnamed));
        }
        let address = if option == "net" { "macaddr" } else { "mac" };
        if option == "nic" || kind == "nic" {
            if option == "net" {
                let odd =
                    odd(&props, &["type", "id", "netdev", "macaddr", "model", "name", "addr", "vectors"]);
                self.refuse_odd(&said, &odd)?;
            }
            props.remove("macaddr");
            props.set(address, &self.mac());
        }
        Some(props.render("type"))
    }

    fn refuse_odd(&mut self, said: &str, odd: &[String]) -> Option<()> {
        if odd.is_empty() {
            return Some(());
        }
        self.refused.push(format!("{said}: a network with {}", odd.join(",")));
        None
    }

    fn user(&mut self, said: &str, props: &mut Props) -> Option<()> {
        let known: Vec<&str> = USER.iter().copied().chain(["hostfwd", "mac", "macaddr"]).collect();
        self.refuse_odd(said, &odd(props, &known))?;
        let mut bad = None;
        for rule in props.all_mut("hostfwd") {
            match self.forward(rule) {
                Some(changed) => *rule = changed,
                None => {
                    bad = Some(format!(
                        "{said}: a host forward '{rule}' that is not PROTOCOL:ADDRESS:PORT-ADDRESS:PORT"
                    ))
                }
            }
        }
        match bad {
            Some(bad) => {
                self.refused.push(bad);
                None
            }
            None => Some(()),
        }
    }

    /// `[tcp|udp]:[HOSTADDRESS]:HOSTPORT-[ADDRESS]:PORT` with a host port of each clone's own.
    fn forward(&mut self, rule: &str) -> Option<String> {
        let (host, guest) = rule.rsplit_once('-')?;
        let (protocol, place) = host.split_once(':')?;
        let (address, port) = place.rsplit_once(':')?;
        let (_, inner) = guest.rsplit_once(':')?;
        let is_number = |text: &str| text.parse::<u16>().is_ok();
        if !matches!(protocol, "" | "tcp" | "udp") || !is_number(port) || !is_number(inner) {
            return None;
        }
        let protocol = if protocol.is_empty() { "tcp" } else { protocol };
        // Each name is one port of the host, for TCP and for UDP.
        let free = |name: &str| !self.ports.iter().any(|(n, p)| n == name && p == protocol);
        let number = if free(inner) {
            inner.to_owned()
        } else {
            (1..).map(|n: u32| n.to_string()).find(|n| free(n))?
        };
        self.ports.push((number.clone(), protocol.to_owned()));
        Some(format!("{protocol}:{address}:{{port:{number}}}-{guest}"))
    }

    fn tap(&mut self, said: &str, props: &mut Props) -> Option<()> {
        let known = [
            "type",
            "id",
            "ifname",
            "script",
            "downscript",
            "br",
            "helper",
            "sndbuf",
            "vnet_hdr",
            "vhost",
            "queues",
            "poll-us",
            "model",
            "mac",
            "macaddr",
            "name",
            "netdev",
        ];
        let mut odd = odd(props, &known);
        let script = props.get("script").unwrap_or("no");
        if script == "no" && props.get("helper").is_none() {
            odd.insert(0, "no script that makes one for each clone".into());
        }
        self.refuse_odd(said, &odd)?;
        // Each clone gets a device of its own, which the kernel names.
        props.remove("ifname");
        self.shared(said);
        Some(())
    }

    fn shared(&mut self, said: &str) {
        self.warnings.push(format!(
            "{said}: guests of clones have the MAC and IP address of the captured one, so their cards are without a link \
             until somebody sets it"
        ));
    }
}

/// True for a network on which a guest meets others.
fn is_shared(kind: &str) -> bool {
    matches!(kind, "tap" | "bridge")
}

/// The names of networks of a command line on which clones would meet the guest that they were.
pub fn shared(argv: &[String]) -> Vec<String> {
    let name = |(option, value): (&str, Option<&str>)| {
        let props =
            matches!(option, "netdev" | "nic" | "net").then(|| Props::parse(value?, "type")).flatten()?;
        props.get("id").filter(|_| props.get("type").is_some_and(is_shared)).map(str::to_owned)
    };
    options(argv).into_iter().filter_map(name).collect()
}

/// Options that are not among the known ones, and those that name a descriptor.
fn odd(props: &Props, known: &[&str]) -> Vec<String> {
    props
        .iter()
        .filter(|(key, _)| !known.contains(key))
        .map(|(key, value)| format!("{key}={value}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_get_ports_of_their_own() {
        let mut all = Networks::default();
        let text =
            "user,id=n0,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::5353-10.0.2.15:22,hostfwd=tcp::1-:22";
        assert_eq!(
            all.option("netdev", text).unwrap(),
            "user,id=n0,hostfwd=tcp:127.0.0.1:{port:22}-:22,hostfwd=udp::{port:22}-10.0.2.15:22,\
             hostfwd=tcp::{port:1}-:22"
        );
        assert!(all.given);
        assert_eq!(
            all.option("nic", "user,model=e1000,mac=52:54:00:12:34:56").unwrap(),
            "user,model=e1000,mac={mac}"
        );
        assert_eq!(all.option("net", "nic,model=e1000").unwrap(), "nic,model=e1000,macaddr={mac:1}");
        assert_eq!(all.option("net", "none").unwrap(), "none");
        assert_eq!(all.refused, Vec::<String>::new());
    }

    #[test]
    fn networks_of_the_host_are_refused_by_name() {
        for (text, words) in [
            ("tap,id=n0,ifname=tap0,script=no", "no script"),
            ("tap,id=n0", "no script"),
            ("tap,id=n0,fd=3,script=/x", "fd=3"),
            ("vhost-user,id=n0,chardev=c", "kind vhost-user"),
            ("socket,id=n0,listen=:1", "kind socket"),
            ("user,id=n0,smb=/srv", "smb=/srv"),
            ("user,id=n0,guestfwd=tcp:1-cmd:x", "guestfwd="),
            ("user,id=n0,hostfwd=unix:/x-:1", "host forward"),
        ] {
            let mut all = Networks::default();
            assert_eq!(all.option("netdev", text), None, "{text}");
            assert!(all.refused[0].contains(words), "{text}: {:?}", all.refused);
        }
        let mut all = Networks::default();
        let tap = all.option("netdev", "tap,id=n0,ifname=tap3,script=/etc/up,vhost=on").unwrap();
        assert_eq!(tap, "tap,id=n0,script=/etc/up,vhost=on");
        assert!(all.warnings[0].contains("MAC"));
    }
}
